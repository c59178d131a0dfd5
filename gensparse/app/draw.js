// Drawing with a finger, a pen or the mouse: a mask over a picture, and boxes on the empty canvas of a new one.
const GensparseDraw = {
  COLOURS: ["#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4"],

  make(name, cls = "", text = "") {
    const element = document.createElement(name);
    if (cls) element.className = cls;
    if (text) element.textContent = text;
    return element;
  },

  button(text, title, act) {
    const button = this.make("button", "", text);
    button.type = "button";
    button.title = title;
    button.addEventListener("click", act);
    return button;
  },

  // Put text into a field of the form, as if it had been typed.
  tell(target, text) {
    const field = document.querySelector(`#${CSS.escape(target)} textarea, #${CSS.escape(target)} input`);
    if (!field || field.value === text) return;
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  },

  // Place of a pointer in shares of an element, 0 to 1.
  share(element, event) {
    const box = element.getBoundingClientRect();
    const within = (x) => Math.min(1, Math.max(0, x));
    return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
  },

  // (left, top, right, bottom) of two corners, in thousandths; null for a click without a way.
  box([x0, y0], [x1, y1]) {
    const round = (x) => Math.round(x * 1000) / 1000;
    const box = [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)].map(round);
    return box[2] - box[0] < 0.01 || box[3] - box[1] < 0.01 ? null : box;
  },

  // Follow a pointer from down to up.
  follow(element, { down, move, up }) {
    let active = null;
    element.addEventListener("pointerdown", (event) => {
      if (active !== null || event.button > 0) return;
      active = event.pointerId;
      try { element.setPointerCapture(active); } catch { /* the pointer has gone again */ }
      event.preventDefault();
      down(this.share(element, event));
    });
    element.addEventListener("pointermove", (event) => {
      if (event.pointerId === active) move(this.share(element, event));
    });
    for (const name of ["pointerup", "pointercancel"]) {
      element.addEventListener(name, (event) => {
        if (event.pointerId !== active) return;
        active = null;
        up(this.share(element, event));
      });
    }
  },
};

// Drawn anew when the server changes its data; gradio then changes attributes and takes away what was drawn.
class GensparseDrawn extends HTMLElement {
  connectedCallback() { if (!this.childElementCount) this.draw(); }
  attributeChangedCallback() {
    if (!this.isConnected || this.waits) return;
    this.waits = true;
    queueMicrotask(() => { this.waits = false; this.replaceChildren(); this.draw(); });
  }
}

// A picture to paint a mask on: brush, eraser, one box. The mask goes to the form as text, see cast.py.
class GensparseMask extends GensparseDrawn {
  static observedAttributes = ["data-src"];

  draw() {
    delete this.dataset.ready;
    this.tool = "brush";
    this.width = 0.08; // of the brush, in shares of the longer side
    this.image = GensparseDraw.make("img");
    this.image.alt = "your picture, to paint the subject on";
    this.image.draggable = false;
    this.canvas = GensparseDraw.make("canvas");
    this.bar = GensparseDraw.make("div", "gs-bar");
    const stage = GensparseDraw.make("div", "gs-paint");
    stage.append(this.image, this.canvas);
    this.append(this.bar, stage);
    this.image.addEventListener("load", () => {
      this.canvas.width = this.image.naturalWidth;
      this.canvas.height = this.image.naturalHeight;
      this.listen();
      this.dataset.ready = "";
    });
    this.image.src = this.dataset.src;
    this.tools();
  }

  tools() {
    const names = { brush: "Brush", eraser: "Eraser", box: "Box" };
    const titles = { brush: "Paint the subject", eraser: "Take paint away", box: "The subject is inside of a box" };
    for (const [tool, text] of Object.entries(names)) {
      const button = GensparseDraw.button(text, titles[tool], () => this.choose(tool));
      button.dataset.tool = tool;
      this.bar.append(button);
    }
    const size = GensparseDraw.make("input");
    Object.assign(size, { type: "range", min: "0.01", max: "0.3", step: "0.01", value: String(this.width) });
    size.setAttribute("aria-label", "Width of the brush");
    size.title = "Width of the brush";
    size.addEventListener("input", (event) => { event.stopPropagation(); this.width = Number(size.value); });
    this.bar.append(size, GensparseDraw.button("Clear", "No mask: all of the picture", () => this.clear()));
    this.choose("brush");
  }

  choose(tool) {
    this.tool = tool;
    for (const button of this.bar.querySelectorAll("[data-tool]")) {
      button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
    }
  }

  clear() {
    this.pen?.clearRect(0, 0, this.canvas.width, this.canvas.height);
    GensparseDraw.tell(this.dataset.target, "");
  }

  listen() {
    const { canvas } = this;
    this.pen = canvas.getContext("2d", { willReadFrequently: true });
    this.pen.fillStyle = this.pen.strokeStyle = "#00d8a0";
    this.pen.lineCap = this.pen.lineJoin = "round";
    let from, last;
    GensparseDraw.follow(canvas, {
      down: (at) => {
        from = last = at;
        if (this.tool !== "box") this.stroke(at, at);
      },
      move: (at) => {
        if (this.tool === "box") this.fill(GensparseDraw.box(from, at));
        else this.stroke(last, at);
        last = at;
      },
      up: (at) => {
        if (this.tool !== "box") return GensparseDraw.tell(this.dataset.target, this.text());
        const box = GensparseDraw.box(from, at);
        this.fill(box);
        GensparseDraw.tell(this.dataset.target, box ? box.join(":") : "");
      },
    });
  }

  stroke([x0, y0], [x1, y1]) {
    const { width, height } = this.canvas;
    this.pen.globalCompositeOperation = this.tool === "eraser" ? "destination-out" : "source-over";
    this.pen.lineWidth = Math.max(2, this.width * Math.max(width, height));
    this.pen.beginPath();
    this.pen.moveTo(x0 * width, y0 * height);
    this.pen.lineTo(x1 * width + 0.01, y1 * height);
    this.pen.stroke();
    this.pen.globalCompositeOperation = "source-over";
  }

  fill(box) {
    const { width, height } = this.canvas;
    this.pen.clearRect(0, 0, width, height);
    if (!box) return;
    const [left, top, right, bottom] = box;
    this.pen.fillRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  }

  // "WIDTHxHEIGHT:" and the lengths of runs, outside first; every second pixel of masks that are too intricate.
  text() {
    const { width, height } = this.canvas;
    const data = this.pen.getImageData(0, 0, width, height).data;
    for (let step = 1; ; step *= 2) {
      const [w, h] = [Math.ceil(width / step), Math.ceil(height / step)];
      const runs = [];
      let [inside, run, any] = [false, 0, false];
      for (let y = 0; y < h; y++) {
        for (let x = 0; x < w; x++) {
          const painted = data[4 * (y * step * width + x * step) + 3] > 127;
          any ||= painted;
          if (painted !== inside) { runs.push(run); run = 0; inside = painted; }
          run++;
        }
      }
      if (!any) return "";
      runs.push(run);
      const text = `${w}x${h}:${runs.join(",")}`;
      if (text.length < 100000) return text;
    }
  }
}
if (!customElements.get("gs-mask")) customElements.define("gs-mask", GensparseMask);

// The empty canvas of the picture to be made: choose a subject, draw where it is to be.
class GensparsePlaces extends GensparseDrawn {
  static observedAttributes = ["data-boxes", "data-width", "data-height"];
  static chosen = 0;
  static count = 0;

  draw() {
    let boxes = [];
    try { boxes = JSON.parse(this.dataset.boxes || "[]"); } catch { /* nothing to show */ }
    this.boxes = boxes;
    const bar = GensparseDraw.make("div", "gs-bar");
    this.stage = GensparseDraw.make("div", "gs-canvas");
    const ratio = this.dataset.width / this.dataset.height;
    Object.assign(this.stage.style, { aspectRatio: String(ratio), width: `min(100%, ${Math.round(320 * ratio)}px)` });
    this.buttons = boxes.map((item, k) => {
      const button = GensparseDraw.button(item.name, `Draw the place of ${item.name}`, () => this.choose(k));
      button.style.borderLeft = `6px solid ${GensparseDraw.COLOURS[item.number - 1]}`;
      bar.append(button);
      return button;
    });
    bar.append(GensparseDraw.button("No place", "Take the box of the chosen subject away", () => this.tell(null)));
    this.append(bar, this.stage);
    this.shapes = boxes.map((item) => this.shape(item));
    this.choose(Math.min(GensparsePlaces.chosen, boxes.length - 1));
    let from;
    GensparseDraw.follow(this.stage, {
      down: (at) => { from = at; },
      move: (at) => this.place(this.shapes[GensparsePlaces.chosen], GensparseDraw.box(from, at)),
      up: (at) => { const box = GensparseDraw.box(from, at); if (box) this.tell(box); },
    });
  }

  choose(k) {
    GensparsePlaces.chosen = k;
    this.buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(n === k)));
  }

  tell(box) {
    const chosen = GensparsePlaces.chosen;
    this.place(this.shapes[chosen], box);
    const text = box ? box.join(", ") : "";
    GensparseDraw.tell(this.dataset.target, `${this.boxes[chosen].number}:${text}:${++GensparsePlaces.count}`);
  }

  shape(item) {
    const shape = GensparseDraw.make("div", "gs-place", item.name);
    shape.style.setProperty("--c", GensparseDraw.COLOURS[item.number - 1]);
    this.stage.append(shape);
    this.place(shape, item.box);
    return shape;
  }

  place(shape, box) {
    shape.hidden = !box;
    if (!box) return;
    const percent = (x) => `${100 * x}%`;
    const [left, top, right, bottom] = box;
    Object.assign(shape.style, {
      left: percent(left), top: percent(top), width: percent(right - left), height: percent(bottom - top),
    });
  }
}
if (!customElements.get("gs-places")) customElements.define("gs-places", GensparsePlaces);
