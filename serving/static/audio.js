// The microphone, the speaker, and the two forms in which sound travels: Opus in Ogg, or samples of 16 bits.

import { OggReader, OggWriter } from "./ogg.js";

export const RATE = 24000;
const OPUS = { codec: "opus", sampleRate: RATE, numberOfChannels: 1 };
const OPUS_OUT = { ...OPUS, bitrate: 32000, opus: { frameDuration: 20000, application: "voip" } };

/** Why there is no microphone, in words, or null. */
export function microphoneProblem() {
  if (navigator.mediaDevices?.getUserMedia) return null;
  if (!isSecureContext) {
    return `This page came over plain http from ${location.host}, and browsers give the microphone only to https and to localhost.
Ways to mend it:
• On the machine that runs the server, open http://localhost:${location.port || 80}/
• From another machine: ssh -L ${location.port || 80}:localhost:${location.port || 80} ${location.hostname}, then open http://localhost:${location.port || 80}/ here
• Start the server with --tls-cert and --tls-key, and open this page over https.`;
  }
  return "This browser has no access to a microphone.";
}

/** Whether this browser can speak Opus as Moshi's clients do. */
export async function speaksOpus() {
  if (typeof AudioEncoder === "undefined" || typeof AudioDecoder === "undefined") return false;
  try {
    const [out, back] = await Promise.all([AudioEncoder.isConfigSupported(OPUS_OUT), AudioDecoder.isConfigSupported(OPUS)]);
    return out.supported && back.supported;
  } catch {
    return false;
  }
}

class OpusCodec {
  #encoder;
  #decoder;
  #writer = new OggWriter(RATE);
  #reader = new OggReader();
  #time = 0;
  #position = 0;
  #received = 0;

  constructor(send, play, failed) {
    this.#encoder = new AudioEncoder({
      output: (chunk) => {
        const packet = new Uint8Array(chunk.byteLength);
        chunk.copyTo(packet);
        this.#position += 960; // 20 ms at 48 kHz
        send(this.#writer.page(packet, this.#position));
      },
      error: failed,
    });
    this.#encoder.configure(OPUS_OUT);
    this.#decoder = new AudioDecoder({
      output: (data) => {
        const samples = new Float32Array(data.numberOfFrames);
        data.copyTo(samples, { planeIndex: 0, format: "f32-planar" });
        play(data.sampleRate === 2 * RATE ? halved(samples) : samples);
        data.close();
      },
      error: failed,
    });
    this.#decoder.configure(OPUS);
    for (const page of this.#writer.headers()) send(page);
  }

  encode(frame) {
    const data = new AudioData({
      format: "f32-planar", sampleRate: RATE, numberOfFrames: frame.length, numberOfChannels: 1, timestamp: this.#time, data: frame,
    });
    this.#time += (1e6 * frame.length) / RATE;
    this.#encoder.encode(data);
    data.close();
  }

  decode(bytes) {
    for (const packet of this.#reader.push(bytes)) {
      this.#decoder.decode(new EncodedAudioChunk({ type: "key", timestamp: this.#received, data: packet }));
      this.#received += 20000;
    }
  }

  close() {
    for (const codec of [this.#encoder, this.#decoder]) if (codec.state !== "closed") codec.close();
  }
}

function halved(samples) {
  return Float32Array.from({ length: samples.length >> 1 }, (_, at) => 0.5 * (samples[2 * at] + samples[2 * at + 1]));
}

class PcmCodec {
  #send;
  #play;

  constructor(send, play) {
    this.#send = send;
    this.#play = play;
  }

  encode(frame) {
    const samples = Int16Array.from(frame, (value) => Math.round(32767 * Math.max(-1, Math.min(1, value))));
    this.#send(new Uint8Array(samples.buffer));
  }

  decode(bytes) {
    const samples = new Int16Array(bytes.slice().buffer);
    this.#play(Float32Array.from(samples, (value) => value / 32768));
  }

  close() {}
}

/** The microphone and the speaker of one conversation. */
export class Sound {
  #context;
  #stream;
  #source;
  #microphone;
  #player;
  #codec = null;

  /** Asks for the microphone. `told` gets what waits to be played. */
  static async open(told) {
    const sound = new Sound();
    sound.#stream = await navigator.mediaDevices.getUserMedia({
      audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true },
    });
    try {
      await sound.#connect(new AudioContext({ sampleRate: RATE, latencyHint: "interactive" }));
    } catch {
      await sound.#context.close();
      await sound.#connect(new AudioContext({ latencyHint: "interactive" })); // a browser that does not resample microphones
    }
    sound.#player.port.onmessage = (event) => told(event.data);
    return sound;
  }

  async #connect(context) {
    this.#context = context;
    await context.resume();
    await context.audioWorklet.addModule("worklet.js");
    this.#source = context.createMediaStreamSource(this.#stream);
    this.#microphone = new AudioWorkletNode(context, "microphone", { numberOfOutputs: 0 });
    this.#player = new AudioWorkletNode(context, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.#source.connect(this.#microphone);
    this.#player.connect(context.destination);
  }

  /** Begin to send: `format` is opus or pcm_s16. */
  start(format, send, failed) {
    const play = (samples) => this.#player.port.postMessage(samples);
    this.#codec?.close();
    const codec = format === "opus" ? new OpusCodec(send, play, failed) : new PcmCodec(send, play);
    this.#codec = codec;
    this.#microphone.port.onmessage = (event) => codec.encode(event.data);
  }

  hear(bytes) {
    this.#codec?.decode(bytes);
  }

  /** Stop sending, until `start`. */
  hold() {
    this.#microphone.port.onmessage = null;
  }

  async close() {
    this.hold();
    this.#codec?.close();
    for (const track of this.#stream.getTracks()) track.stop();
    if (this.#context.state !== "closed") await this.#context.close();
  }
}
