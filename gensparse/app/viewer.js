// A viewer for pictures of any size: fit, 100 %, wheel and pinch to zoom, drag to pan, keys.
class GensparseViewer extends HTMLElement {
  static observedAttributes = ["data-pictures"];

  attributeChangedCallback() { if (this.isConnected) this.draw(); }
  connectedCallback() { this.draw(); }
  disconnectedCallback() { this.watch?.disconnect(); }

  draw() {
    let pictures = [];
    try { pictures = JSON.parse(this.dataset.pictures || "[]"); } catch { /* nothing to show */ }
    const key = JSON.stringify(pictures);
    if (key === this.key) return;
    this.key = key;
    this.pictures = pictures;
    this.watch?.disconnect();
    this.replaceChildren();
    if (!pictures.length) return;

    const bar = this.make("div", "gs-bar");
    const add = (text, title, act) => {
      const button = this.make("button", "", text);
      button.type = "button";
      button.title = title;
      button.setAttribute("aria-label", title);
      button.addEventListener("click", act);
      bar.append(button);
    };
    add("Fit", "Whole picture (key 0)", () => this.fit());
    add("100%", "One pixel of the picture is one pixel of the screen (key 1)", () => this.zoomTo(1));
    add("+", "Larger (key +)", () => this.zoomBy(1.5));
    add("\u2212", "Smaller (key -)", () => this.zoomBy(1 / 1.5));
    add("Full screen", "Full screen (key f)", () => this.fullScreen());
    this.label = this.make("span", "gs-zoom");
    bar.append(this.label);

    this.stage = this.make("div", "gs-stage");
    this.stage.tabIndex = 0;
    this.stage.setAttribute("role", "img");
    this.image = this.make("img");
    this.image.draggable = false;
    this.image.decoding = "async";
    this.stage.append(this.image);
    this.append(bar, this.stage);
    if (pictures.length > 1) this.append(this.strip());
    this.listen();
    this.choose(0);
  }

  make(name, cls = "", text = "") {
    const element = document.createElement(name);
    if (cls) element.className = cls;
    if (text) element.textContent = text;
    return element;
  }

  strip() {
    const strip = this.make("div", "gs-strip");
    this.pictures.forEach((picture, index) => {
      const button = this.make("button", "", `${index + 1}`);
      button.type = "button";
      button.title = picture.name;
      button.addEventListener("click", () => this.choose(index));
      strip.append(button);
    });
    return strip;
  }

  choose(index) {
    this.picture = this.pictures[index];
    this.image.alt = this.picture.name;
    this.stage.setAttribute("aria-label", `${this.picture.name}, ${this.picture.width} by ${this.picture.height} pixels`);
    this.image.width = this.picture.width;
    this.image.height = this.picture.height;
    this.image.src = this.picture.src;
    this.querySelectorAll(".gs-strip button").forEach((b, k) => b.setAttribute("aria-pressed", String(k === index)));
    this.fit();
  }

  // Scale is in screen pixels per pixel of the picture, whatever the screen's density is.
  get density() { return window.devicePixelRatio || 1; }

  fit() {
    const { clientWidth: w, clientHeight: h } = this.stage;
    this.fitted = true;
    this.scale = Math.min(w / this.picture.width, h / this.picture.height) * this.density || 1;
    this.x = (w - this.picture.width * this.scale / this.density) / 2;
    this.y = (h - this.picture.height * this.scale / this.density) / 2;
    this.place();
  }

  zoomTo(scale, at) {
    const { clientWidth: w, clientHeight: h } = this.stage;
    const [cx, cy] = at || [w / 2, h / 2];
    scale = Math.min(32, Math.max(0.01, scale));
    this.x = cx - (cx - this.x) * scale / this.scale;
    this.y = cy - (cy - this.y) * scale / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.place();
  }

  zoomBy(factor, at) { this.zoomTo(this.scale * factor, at); }

  place() {
    const { clientWidth: w, clientHeight: h } = this.stage;
    const width = this.picture.width * this.scale / this.density;
    const height = this.picture.height * this.scale / this.density;
    const keep = (at, size, room) => size <= room ? (room - size) / 2 : Math.min(0, Math.max(room - size, at));
    this.x = keep(this.x, width, w);
    this.y = keep(this.y, height, h);
    this.image.style.transform = `translate(${this.x}px, ${this.y}px) scale(${this.scale / this.density})`;
    this.image.style.imageRendering = this.scale >= 2 ? "pixelated" : "auto";
    this.label.textContent = `${Math.round(this.scale * 100)}%`;
  }

  fullScreen() {
    if (document.fullscreenElement) document.exitFullscreen();
    else this.requestFullscreen?.();
  }

  listen() {
    const stage = this.stage;
    const at = (event) => {
      const box = stage.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const points = new Map();
    const spread = () => {
      const [a, b] = [...points.values()];
      return Math.hypot(a[0] - b[0], a[1] - b[1]);
    };
    stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), at(event));
    }, { passive: false });
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      points.set(event.pointerId, at(event));
    });
    stage.addEventListener("pointermove", (event) => {
      const before = points.get(event.pointerId);
      if (!before) return;
      const now = at(event);
      if (points.size === 2) {
        const wide = spread();
        points.set(event.pointerId, now);
        const [a, b] = [...points.values()];
        if (wide > 0) this.zoomBy(spread() / wide, [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2]);
        return;
      }
      points.set(event.pointerId, now);
      this.x += now[0] - before[0];
      this.y += now[1] - before[1];
      this.fitted = false;
      this.place();
    });
    for (const name of ["pointerup", "pointercancel"]) {
      stage.addEventListener(name, (event) => points.delete(event.pointerId));
    }
    stage.addEventListener("dblclick", (event) => this.scale < 0.99 ? this.zoomTo(1, at(event)) : this.fit());
    stage.addEventListener("keydown", (event) => {
      const step = 60;
      const move = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[event.key];
      if (move) { this.x += move[0]; this.y += move[1]; this.fitted = false; this.place(); }
      else if (event.key === "0") this.fit();
      else if (event.key === "1") this.zoomTo(1);
      else if (event.key === "+" || event.key === "=") this.zoomBy(1.5);
      else if (event.key === "-") this.zoomBy(1 / 1.5);
      else if (event.key === "f") this.fullScreen();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.watch = new ResizeObserver(() => this.fitted ? this.fit() : this.place());
    this.watch.observe(stage);
  }
}
if (!customElements.get("gs-viewer")) customElements.define("gs-viewer", GensparseViewer);

// Buttons that copy the text beside them.
document.addEventListener("click", async (event) => {
  const button = event.target.closest?.("[data-gs-copy]");
  if (!button) return;
  const text = button.parentElement.querySelector("pre")?.textContent || "";
  try {
    await navigator.clipboard.writeText(text);
  } catch { // pages that are not on localhost or https have no clipboard
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1500);
});

// Ctrl+Enter (or Cmd+Enter) starts what the open tab makes.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  for (const button of document.querySelectorAll("button.gs-run, .gs-run button")) {
    if (button.offsetParent !== null && !button.disabled) { event.preventDefault(); button.click(); return; }
  }
});
