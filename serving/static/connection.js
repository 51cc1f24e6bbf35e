// Moshi's WebSocket protocol, with the messages of this server where it has them. A stock server sends none of those.

export const EXTENSION = "moshi-ttt.1";
const HANDSHAKE = 0, AUDIO = 1, TEXT = 2, CONTROL = 3, METADATA = 4, ERROR = 5;
const RETRIES = 5;

/** The token in the page's address, behind the #: browsers do not send that part anywhere. */
export function token() {
  return new URLSearchParams(location.hash.slice(1)).get("token");
}

export async function information() {
  const headers = token() ? { Authorization: `Bearer ${token()}` } : {};
  try {
    const answer = await fetch("api/info", { headers });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** Calls `on.ready`, `on.audio`, `on.text`, `on.message`, `on.words`, `on.lost` and `on.closed`. */
export class Connection {
  #on;
  #format;
  #socket = null;
  #resume = null;
  #ended = false;
  #retries = 0;
  #queryExtra;

  constructor(format, on, queryExtra = "") {
    this.#format = format;
    this.#on = on;
    this.#queryExtra = queryExtra;
    this.#open();
  }

  #open() {
    const query = new URLSearchParams(this.#queryExtra);
    query.set("protocol", EXTENSION);
    if (this.#format !== "opus") query.set("format", this.#format);
    if (this.#resume) query.set("resume", this.#resume);
    const address = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/chat?${query}`;
    this.#socket = token() ? new WebSocket(address, [EXTENSION, `moshi-ttt.token.${token()}`]) : new WebSocket(address);
    this.#socket.binaryType = "arraybuffer";
    this.#socket.onmessage = (event) => this.#take(new Uint8Array(event.data));
    this.#socket.onclose = (event) => this.#closed(event);
  }

  #take(bytes) {
    const payload = bytes.subarray(1);
    const words = () => new TextDecoder().decode(payload);
    if (bytes[0] === HANDSHAKE) {
      this.#retries = 0;
      this.#on.ready();
    } else if (bytes[0] === AUDIO) this.#on.audio(payload);
    else if (bytes[0] === TEXT) this.#on.text(words());
    else if (bytes[0] === ERROR) this.#on.words(words());
    else if (bytes[0] === METADATA) {
      const message = JSON.parse(words());
      if (message.type === "session") this.#resume = message.resume;
      this.#on.message(message);
    }
  }

  #closed(event) {
    const lost = !this.#ended && this.#resume && event.code === 1006 && this.#retries < RETRIES;
    if (!lost) {
      this.#on.closed(event.code, event.reason);
      return;
    }
    this.#on.lost();
    setTimeout(() => this.#open(), 300 * 2 ** this.#retries++);
  }

  get open() {
    return this.#socket.readyState === WebSocket.OPEN;
  }

  audio(bytes) {
    this.#send(AUDIO, bytes);
  }

  /** A new conversation. A stock server knows this message too. */
  restart() {
    this.#send(CONTROL, [3]);
  }

  ask(type, fields = {}) {
    this.#send(METADATA, new TextEncoder().encode(JSON.stringify({ type, ...fields })));
  }

  #send(tag, bytes) {
    if (!this.open) return;
    const message = new Uint8Array(1 + bytes.length);
    message[0] = tag;
    message.set(bytes, 1);
    this.#socket.send(message);
  }

  close() {
    this.#ended = true;
    this.#socket.close(1000);
  }
}
