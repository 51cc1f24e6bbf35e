// Ogg pages (RFC 3533) with Opus packets (RFC 7845): what Moshi's clients and servers send each other.

const TABLE = new Uint32Array(256).map((_, index) => {
  let value = index << 24;
  for (let bit = 0; bit < 8; bit++) value = value & 0x80000000 ? (value << 1) ^ 0x04c11db7 : value << 1;
  return value >>> 0;
});

export function checksum(bytes) {
  let value = 0;
  for (const byte of bytes) value = ((value << 8) ^ TABLE[(value >>> 24) ^ byte]) >>> 0;
  return value;
}

function text(words) {
  return new TextEncoder().encode(words);
}

/** One page a packet, which is what a live stream needs. */
export class OggWriter {
  #sequence = 0;
  #serial;
  #rate;

  constructor(rate, serial = 1) {
    this.#rate = rate;
    this.#serial = serial;
  }

  /** The two pages that begin a stream. */
  headers() {
    const head = new Uint8Array(19), view = new DataView(head.buffer);
    head.set(text("OpusHead"));
    head[8] = 1; // version
    head[9] = 1; // channels
    view.setUint32(12, this.#rate, true);
    const vendor = text("moshi-ttt"), tags = new Uint8Array(16 + vendor.length);
    tags.set(text("OpusTags"));
    new DataView(tags.buffer).setUint32(8, vendor.length, true);
    tags.set(vendor, 12);
    return [this.page(head, 0, 2), this.page(tags, 0)];
  }

  /** A packet that ends at `position`, in samples of 48 kHz. */
  page(packet, position, flags = 0) {
    const lengths = new Array(Math.floor(packet.length / 255)).fill(255).concat(packet.length % 255);
    if (lengths.length > 255) throw new Error("A packet of Opus is too long for a page.");
    const page = new Uint8Array(27 + lengths.length + packet.length), view = new DataView(page.buffer);
    page.set(text("OggS"));
    page[5] = flags;
    view.setBigUint64(6, BigInt(position), true);
    view.setUint32(14, this.#serial, true);
    view.setUint32(18, this.#sequence++, true);
    page[26] = lengths.length;
    page.set(lengths, 27);
    page.set(packet, 27 + lengths.length);
    view.setUint32(22, checksum(page), true);
    return page;
  }
}

/** Packets of sound from bytes that come in any pieces. */
export class OggReader {
  #rest = new Uint8Array(0);
  #partial = [];

  push(bytes) {
    const all = new Uint8Array(this.#rest.length + bytes.length);
    all.set(this.#rest);
    all.set(bytes, this.#rest.length);
    const packets = [];
    let at = 0;
    while (all.length - at >= 27) {
      if (all[at] !== 79 || all[at + 1] !== 103 || all[at + 2] !== 103 || all[at + 3] !== 83) throw new Error("This is not Ogg.");
      const count = all[at + 26], body = at + 27 + count;
      if (all.length < body) break;
      const lengths = all.subarray(at + 27, body);
      const end = lengths.reduce((sum, length) => sum + length, body);
      if (all.length < end) break;
      let from = body;
      for (const length of lengths) {
        this.#partial.push(...all.subarray(from, from + length));
        from += length;
        if (length < 255) {
          packets.push(Uint8Array.from(this.#partial));
          this.#partial = [];
        }
      }
      at = end;
    }
    this.#rest = all.slice(at);
    return packets.filter((packet) => !isHeader(packet));
  }
}

function isHeader(packet) {
  const start = String.fromCharCode(...packet.subarray(0, 8));
  return start === "OpusHead" || start === "OpusTags";
}
