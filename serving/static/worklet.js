// Runs in the browser's audio thread: cuts the microphone into frames, and plays what comes.

const RATE = 24000, FRAME = 1920;
const FIRST = 0.12, MOST = 0.6; // seconds: what is gathered before playing, and what is too late to be played

class Resampler {
  #step;
  #at = 0;
  #last = 0;

  constructor(from, to) {
    this.#step = from / to;
  }

  run(samples) {
    if (this.#step === 1) return samples;
    const out = [];
    while (this.#at < samples.length) {
      const index = Math.floor(this.#at), part = this.#at - index;
      const before = index === 0 ? this.#last : samples[index - 1];
      out.push(before + (samples[index] - before) * part);
      this.#at += this.#step;
    }
    this.#at -= samples.length;
    this.#last = samples[samples.length - 1];
    return Float32Array.from(out);
  }
}

class Microphone extends AudioWorkletProcessor {
  #frame = new Float32Array(FRAME);
  #filled = 0;
  #resampler = new Resampler(sampleRate, RATE);

  process(inputs) {
    const channel = inputs[0][0];
    if (!channel) return true;
    let samples = this.#resampler.run(channel);
    while (samples.length) {
      const part = samples.subarray(0, FRAME - this.#filled);
      this.#frame.set(part, this.#filled);
      this.#filled += part.length;
      samples = samples.subarray(part.length);
      if (this.#filled === FRAME) {
        this.port.postMessage(this.#frame.slice());
        this.#filled = 0;
      }
    }
    return true;
  }
}

class Player extends AudioWorkletProcessor {
  #queue = [];
  #waiting = 0;
  #offset = 0;
  #playing = false;
  #gaps = 0;
  #told = 0;
  #resampler = new Resampler(RATE, sampleRate);

  constructor() {
    super();
    this.port.onmessage = (event) => {
      const samples = this.#resampler.run(event.data);
      this.#queue.push(samples);
      this.#waiting += samples.length;
      while (this.#waiting > MOST * sampleRate && this.#queue.length > 1) {
        this.#waiting -= this.#queue.shift().length - this.#offset;
        this.#offset = 0;
      }
    };
  }

  process(_, outputs) {
    const out = outputs[0][0];
    if (!this.#playing && this.#waiting >= FIRST * sampleRate) this.#playing = true;
    let done = 0;
    while (this.#playing && done < out.length && this.#queue.length) {
      const part = this.#queue[0].subarray(this.#offset, this.#offset + out.length - done);
      out.set(part, done);
      done += part.length;
      this.#offset += part.length;
      this.#waiting -= part.length;
      if (this.#offset === this.#queue[0].length) {
        this.#queue.shift();
        this.#offset = 0;
      }
    }
    if (this.#playing && done < out.length) {
      this.#playing = false;
      this.#gaps++;
    }
    if (currentTime - this.#told > 0.5) {
      this.#told = currentTime;
      this.port.postMessage({ gaps: this.#gaps, seconds: this.#waiting / sampleRate });
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
registerProcessor("player", Player);
