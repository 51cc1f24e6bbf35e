// Runs the page's scripts in Node.js with stand-ins for the browser: what a person would do, and what the page then shows.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

const ids = [...readFileSync("index.html", "utf8").matchAll(/ id="([\w-]+)"/g)].map((found) => found[1]);

class Node {
  constructor(tag) {
    Object.assign(this, { tag, children: [], attributes: {}, text: "", disabled: false, checked: true, value: "1" });
    Object.assign(this, { scrollHeight: 0, scrollTop: 0, clientHeight: 240, clientWidth: 900 });
  }
  get textContent() {
    return this.text + this.children.map((child) => child.textContent ?? child).join("");
  }
  set textContent(value) {
    [this.text, this.children] = [String(value), []];
  }
  append(...children) {
    this.children.push(...children);
  }
  replaceChildren(...children) {
    [this.text, this.children] = ["", children];
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
  }
  querySelectorAll(tag) {
    const inside = this.children.filter((child) => child instanceof Node);
    return [...inside.filter((child) => child.tag === tag), ...inside.flatMap((child) => child.querySelectorAll(tag))];
  }
  getContext() {
    const drawn = (this.drawn = []);
    return new Proxy({}, { get: (_, name) => (...values) => drawn.push([name, ...values]), set: () => true });
  }
}

const elements = Object.fromEntries(ids.map((id) => [id, new Node(id)]));
const sockets = [], nodes = {};
const stored = new Map();
const secure = process.argv[2] !== "plain";
const define = (name, value) => Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });

class FakeSocket {
  static OPEN = 1;
  constructor(url, protocols) {
    Object.assign(this, { url, protocols, readyState: 1, sent: [] });
    sockets.push(this);
  }
  send(bytes) {
    this.sent.push(bytes);
  }
  close(code) {
    if (this.readyState === 3) return;
    this.readyState = 3;
    queueMicrotask(() => this.onclose({ code, reason: "" }));
  }
  receive(tag, payload = "") {
    const bytes = typeof payload === "string" ? new TextEncoder().encode(payload) : payload;
    this.onmessage({ data: Uint8Array.from([tag, ...bytes]).buffer });
  }
  json(value) {
    this.receive(4, JSON.stringify(value));
  }
  get asked() {
    return this.sent.filter((bytes) => bytes[0] === 4).map((bytes) => JSON.parse(new TextDecoder().decode(bytes.subarray(1))));
  }
}

define("WebSocket", FakeSocket);
define("document", {
  getElementById(id) {
    assert(id in elements, `no element ${id}`);
    return elements[id];
  },
  createElement: (tag) => new Node(tag),
});
const hash = secure ? "#token=a-token-that-nobody-guesses" : "";
define("location", { protocol: "http:", host: "moshi:8998", hostname: "moshi", port: "8998", hash, search: "?seed=5" });
define("navigator", secure ? { mediaDevices: { getUserMedia: async () => ({ getTracks: () => [{ stop() {} }] }) } } : {});
define("isSecureContext", secure);
define("localStorage", { getItem: (key) => stored.get(key) ?? null, setItem: (key, value) => stored.set(key, value) });
define("matchMedia", () => ({ addEventListener() {} }));
define("ResizeObserver", class { observe() {} });
define("getComputedStyle", () => ({ getPropertyValue: () => "#000" }));
define("addEventListener", () => {});
define("devicePixelRatio", 2);
define("fetch", async (path, options) => {
  assert.equal(path, "api/info");
  if (secure) assert.equal(options.headers.Authorization, "Bearer a-token-that-nobody-guesses");
  return { ok: true, json: async () => ({ memories: true, slots: 2, blocks: ["a", "b"], model: { "base model": "tiny" } }) };
});
define("AudioContext", class {
  constructor(options) {
    this.state = "running";
    this.destination = {};
    this.audioWorklet = { addModule: async (name) => assert.equal(name, "worklet.js") };
    this.options = options;
  }
  async resume() {}
  async close() {
    this.state = "closed";
  }
  createMediaStreamSource() {
    if (this.options.sampleRate) throw new Error("a browser that does not resample microphones");
    return { connect() {} };
  }
});
define("AudioWorkletNode", class {
  constructor(_, name) {
    this.port = { posted: [], postMessage: (data) => this.port.posted.push(data), onmessage: null };
    nodes[name] = this;
  }
  connect() {}
});

const pause = (milliseconds = 5) => new Promise((done) => setTimeout(done, milliseconds));

await import("./main.js");
await pause();
if (!secure) {
  for (const words of ["plain http", "ssh -L 8998", "--tls-cert"]) assert(elements.problem.textContent.includes(words));
  elements.talk.onclick();
  await pause();
  assert.equal(sockets.length, 0);
  console.log("ok");
  process.exit(0);
}

assert.equal(elements.problem.textContent, "");
assert(elements.model.textContent.includes("2 layers that learn"));
elements.talk.onclick();
await pause(20);
const [socket] = sockets;
assert(socket, elements.problem.textContent);
assert(socket.url.startsWith("ws://moshi:8998/api/chat?"));
assert(!socket.url.includes("token"), "the token is not in the address");
for (const part of ["protocol=moshi-ttt.1", "format=pcm_s16", "seed=5"]) assert(socket.url.includes(part), socket.url);
assert.deepEqual(socket.protocols, ["moshi-ttt.1", "moshi-ttt.token.a-token-that-nobody-guesses"]);

socket.json({ type: "queue", position: 2 });
assert(elements.status.textContent.includes("number 2"));
socket.receive(0);
assert.equal(elements.restart.disabled, false);
assert.equal(elements["memory-controls"].disabled, true, "a stock server has no memory to control");
socket.json({ type: "session", session: "x", resume: "secret", resumed: false, owner: "0".repeat(32), updates: false, volume: 0.5, frames: 0 });
assert.equal(elements["memory-controls"].disabled, false);
assert.equal(elements.learning.checked, false);
assert.equal(elements["volume-value"].textContent, "0.50");

nodes.microphone.port.onmessage({ data: new Float32Array(1920).fill(0.5) });
const sound = socket.sent.find((bytes) => bytes[0] === 1);
assert.equal(sound.length, 1 + 2 * 1920);
assert.equal(new DataView(sound.buffer).getInt16(1, true), 16384);
socket.receive(1, sound.subarray(1));
assert.equal(nodes.player.port.posted[0].length, 1920);
assert(Math.abs(nodes.player.port.posted[0][0] - 0.5) < 1e-3);
nodes.player.port.onmessage({ data: { gaps: 3, seconds: 0.25 } });
assert.equal(elements.buffered.textContent, "250 ms");

socket.receive(2, " hello");
socket.receive(2, " <b>you</b>");
assert.equal(elements.transcript.textContent, " hello <b>you</b>");
const site = { site: "layers.1.sequence", variant: "ttt_ridge", moved: 0.25, inner_loss: null, start_loss: 1.5, updates: 7, skipped: 0 };
for (let second = 0; second < 3; second++) {
  socket.json({ type: "stats", frames: 10, queued: 0, dropped: 2, delay_ms: 41.2, tick_ms: 30, sites: [site, { ...site, moved: 1e-6 }] });
}
assert(elements.sites.textContent.includes("0.250") && elements.sites.textContent.includes("1.0e-6"));
assert.equal(elements.dropped.textContent, "2 of 12");
assert(elements.plot.drawn.some(([name]) => name === "lineTo"), "a curve is drawn");
assert.equal(elements.legend.children.length, 2);

elements.learning.onchange({ target: { checked: true } });
elements.volume.oninput({ target: { value: "0.3" } });
elements.volume.onchange({ target: { value: "0.3" } });
elements.forget.onclick();
elements.save.onclick();
elements.keep.onchange({ target: { checked: true } });
elements.restart.onclick();
const asked = socket.asked.map((each) => each.type);
for (const type of ["list", "learning", "volume", "forget", "save", "keep"]) assert(asked.includes(type), type);
assert.deepEqual([...socket.sent.find((bytes) => bytes[0] === 3)], [3, 3]);
socket.json({ type: "saved", memory: {}, loss: 0.001 });
assert.equal(stored.get("moshi-ttt.owner"), "0".repeat(32));
assert(elements["kept-status"].textContent.includes("0.00100"));
socket.json({ type: "memories", memories: [{ name: "memory-1", kind: "memory", bytes: 2 ** 21, saved: 1.7e9 }] });
assert(elements.kept.textContent.includes("2.0 MiB"));
elements.kept.querySelectorAll("button")[0].onclick();
assert.equal(socket.asked.at(-1).name, "memory-1");
for (const type of ["restored", "deleted", "forgotten", "restarted", "paused", "unheard-of"]) socket.json({ type });
socket.json({ type: "learning", enabled: true });
socket.json({ type: "error", of: "save", message: "The disk is full." });
assert.equal(elements.problem.textContent, "The disk is full.");

socket.readyState = 3;
socket.onclose({ code: 1006, reason: "" });
assert(elements.status.textContent.includes("lost"));
await pause(400);
assert(sockets[1].url.includes("resume=secret"), "a lost connection is taken up again");
sockets[1].receive(0);
sockets[1].json({ type: "session", session: "x", resume: "secret", resumed: true, owner: "1".repeat(32), updates: true, volume: 1, frames: 9 });
assert.deepEqual(sockets[1].asked[0], { type: "owner", owner: "0".repeat(32) });
sockets[1].readyState = 3;
sockets[1].onclose({ code: 1013, reason: "All places are taken." });
await pause();
assert(elements.status.textContent.includes("All places are taken."));
assert.equal(elements.talk.textContent, "Talk");
assert.equal(elements["memory-controls"].disabled, true);
elements.talk.onclick();
await pause(20);
elements.talk.onclick();
await pause();
assert.equal(elements.status.textContent, "Ended.");

// ---- the audio thread
const processors = {};
define("sampleRate", 48000);
define("currentTime", 1);
define("AudioWorkletProcessor", class { port = { posted: [], postMessage: (data) => this.port.posted.push(data), onmessage: null }; });
define("registerProcessor", (name, made) => (processors[name] = made));
await import("./worklet.js");
const microphone = new processors.microphone(), wave = (at) => Math.sin((2 * Math.PI * 440 * at) / 48000);
for (let block = 0; block < 100; block++) microphone.process([[Float32Array.from({ length: 128 }, (_, at) => wave(128 * block + at))]]);
assert.equal(microphone.port.posted.length, Math.floor(6400 / 1920), "6,400 samples of 24 kHz");
const [first] = microphone.port.posted;
const worst = Math.max(...first.map((value, at) => (at ? Math.abs(value - wave(2 * at - 1)) : 0))); // silence came before
assert(worst < 1e-3, `resampled: ${worst}`);
const player = new processors.player(), heard = [];
for (let frame = 0; frame < 4; frame++) player.port.onmessage({ data: new Float32Array(1920).fill(0.5) });
for (let block = 0; block < 200; block++) {
  const out = new Float32Array(128);
  player.process(null, [[out]]);
  heard.push(...out);
}
const loud = heard.filter((value) => value > 0.4).length;
assert(Math.abs(loud - 2 * 4 * 1920) < 10, `${loud} samples were played`);
assert(player.port.posted.at(-1).gaps <= 1);
console.log("ok");
process.exit(0);
