// Two curves for each layer over the last two minutes: how far its memory has moved, and its inner loss.

const SECONDS = 120;
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3], [1, 2], [12, 4]];

export class MemoryPlot {
  #canvas;
  #history = [];

  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  add(sites) {
    this.#history.push({ at: performance.now() / 1000, sites });
    while (this.#history.length > SECONDS * 1.2) this.#history.shift();
    this.draw();
  }

  clear() {
    this.#history = [];
    this.draw();
  }

  draw() {
    const canvas = this.#canvas, scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const half = width >= 560;
    const panels = half
      ? [[0, 0, width / 2, height], [width / 2, 0, width / 2, height]]
      : [[0, 0, width, height / 2], [0, height / 2, width, height / 2]];
    this.#panel(pen, panels[0], "Distance moved", "moved");
    this.#panel(pen, panels[1], "Inner loss", "inner_loss");
  }

  #panel(pen, [left, top, width, height], title, key) {
    const style = getComputedStyle(this.#canvas), ink = style.getPropertyValue("--ink"), soft = style.getPropertyValue("--soft");
    const inner = { left: left + 52, right: left + width - 10, top: top + 26, bottom: top + height - 22 };
    const now = performance.now() / 1000, shown = this.#history.filter((each) => now - each.at <= SECONDS);
    const values = shown.flatMap((each) => each.sites.map((site) => site[key])).filter(Number.isFinite);
    pen.font = "13px system-ui, sans-serif";
    pen.fillStyle = ink;
    pen.fillText(title, inner.left, top + 17);
    pen.strokeStyle = soft;
    pen.lineWidth = 1;
    pen.setLineDash([]);
    pen.strokeRect(inner.left, inner.top, inner.right - inner.left, inner.bottom - inner.top);
    pen.fillStyle = soft;
    pen.font = "11px system-ui, sans-serif";
    pen.fillText(`${SECONDS} s ago`, inner.left, inner.bottom + 15);
    pen.textAlign = "right";
    pen.fillText("now", inner.right, inner.bottom + 15);
    if (values.length) {
      const low = key === "moved" ? 0 : Math.min(...values), high = Math.max(...values), span = high - low || Math.abs(high) || 1;
      pen.fillText(short(low + span), inner.left - 5, inner.top + 9);
      pen.fillText(short(low), inner.left - 5, inner.bottom);
      const x = (at) => inner.right - ((now - at) / SECONDS) * (inner.right - inner.left);
      const y = (value) => inner.bottom - ((value - low) / span) * (inner.bottom - inner.top - 4);
      for (let site = 0; site < shown[0].sites.length; site++) {
        pen.strokeStyle = style.getPropertyValue(`--site-${site % 6}`);
        pen.setLineDash(DASHES[site % DASHES.length]);
        pen.lineWidth = 2;
        pen.beginPath();
        let drawing = false;
        for (const each of shown) {
          const value = each.sites[site]?.[key];
          if (!Number.isFinite(value)) {
            drawing = false;
            continue;
          }
          if (drawing) pen.lineTo(x(each.at), y(value));
          else pen.moveTo(x(each.at), y(value));
          drawing = true;
        }
        pen.stroke();
      }
    } else {
      pen.textAlign = "center";
      pen.fillText("nothing yet", (inner.left + inner.right) / 2, (inner.top + inner.bottom) / 2);
    }
    pen.textAlign = "left";
    pen.setLineDash([]);
  }
}

export function short(value) {
  if (!Number.isFinite(value)) return "–";
  return Math.abs(value) >= 0.001 || value === 0 ? value.toPrecision(3) : value.toExponential(1);
}
