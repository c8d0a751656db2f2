// The canvas: the picture, the boxes on it, and what mouse, fingers and keys do to them.
// A box is [x0, y0, x1, y1], shares of the picture's width and height, on a grid of 1/1000.

const HANDLE = 7, REACH = 12, SMALLEST = 0.02, KEY_STEP = 1 / 64;
const CORNERS = [[0, 1], [2, 1], [0, 3], [2, 3]];  // which ends of a box each corner moves
const HUES = [172, 24, 214, 330, 264, 52, 190, 0, 96, 300];

export const colourOf = (object) => `hsl(${HUES[object.hue % HUES.length]} 60% 36%)`;
const rounded = (value) => Math.round(Math.min(1, Math.max(0, value)) * 1000) / 1000;

export class BoxCanvas {
  // hooks: objects(), selected(), select(id), add(box), begin(), change(), remove(id), view()
  constructor(canvas, hooks) {
    this.canvas = canvas;
    this.hooks = hooks;
    this.drag = null;
    canvas.addEventListener("pointerdown", (event) => this.down(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => { if (this.drag) this.move(event); this.up(); });
    canvas.addEventListener("pointercancel", () => this.up());
    canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.fit()).observe(canvas);
  }

  setSize([height, width]) {
    this.canvas.style.aspectRatio = `${width} / ${height}`;
    this.fit();
  }

  fit() {
    const {width, height} = this.canvas.getBoundingClientRect(), scale = window.devicePixelRatio || 1;
    const size = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
    if (size[0] !== this.canvas.width || size[1] !== this.canvas.height) [this.canvas.width, this.canvas.height] = size;
    this.paint();
  }

  point(event) {
    const area = this.canvas.getBoundingClientRect();
    return [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
  }

  cornerAt([x, y]) {
    const object = this.hooks.objects().find((each) => each.id === this.hooks.selected());
    if (!object) return null;
    const {width, height} = this.canvas.getBoundingClientRect();
    const corner = CORNERS.find(([i, j]) =>
      Math.hypot((object.bbox[i] - x) * width, (object.bbox[j] - y) * height) < REACH);
    return corner ? {object, corner} : null;
  }

  boxAt([x, y]) {  // of several, the smallest
    const area = ({bbox: [x0, y0, x1, y1]}) => (x1 - x0) * (y1 - y0);
    const hit = ({bbox: [x0, y0, x1, y1]}) => x0 <= x && x <= x1 && y0 <= y && y <= y1;
    return this.hooks.objects().filter(hit).sort((one, other) => area(one) - area(other))[0];
  }

  down(event) {
    if (event.button || !this.hooks.view().boxes) return;
    this.canvas.setPointerCapture(event.pointerId);
    const from = this.point(event), corner = this.cornerAt(from), object = corner ? corner.object : this.boxAt(from);
    if (object) {
      this.hooks.select(object.id);
      this.drag = {from, object, before: [...object.bbox], corner: corner && corner.corner, begun: false};
    } else {
      this.hooks.select(null);
      this.drag = {from, box: null};
    }
    event.preventDefault();
    this.canvas.focus({preventScroll: true});
  }

  move(event) {
    const at = this.point(event);
    if (!this.drag) {
      const corner = this.cornerAt(at);
      this.canvas.style.cursor = corner ? "nwse-resize" : this.boxAt(at) ? "move" : "crosshair";
      return;
    }
    const {from, object, before, corner} = this.drag;
    if (!object) {
      const ends = [from[0], from[1], at[0], at[1]].map(rounded);
      this.drag.box = [Math.min(ends[0], ends[2]), Math.min(ends[1], ends[3]), Math.max(ends[0], ends[2]),
        Math.max(ends[1], ends[3])];
      return this.paint();
    }
    if (!this.drag.begun) {
      if (at[0] === from[0] && at[1] === from[1]) return;  // a click
      this.hooks.begin();
      this.drag.begun = true;
    }
    object.bbox = corner ? resized(before, corner, at) : shifted(before, at[0] - from[0], at[1] - from[1]);
    this.hooks.change();
  }

  up() {
    const drag = this.drag;
    this.drag = null;
    if (drag && drag.box && drag.box[2] - drag.box[0] >= SMALLEST && drag.box[3] - drag.box[1] >= SMALLEST) {
      this.hooks.add(drag.box);
    }
    this.paint();
  }

  key(event) {
    const objects = this.hooks.objects(), index = objects.findIndex((each) => each.id === this.hooks.selected());
    const steps = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if ((event.key === "n" || event.key === "p") && objects.length) {
      const next = (index + (event.key === "n" ? 1 : -1) + objects.length) % objects.length;
      this.hooks.select(objects[index < 0 ? 0 : next].id);
    } else if (steps && index >= 0) {
      const [x, y] = steps.map((each) => each * KEY_STEP), box = objects[index].bbox;
      this.hooks.begin();
      objects[index].bbox = event.shiftKey ? resized(box, [2, 3], [box[2] + x, box[3] + y]) : shifted(box, x, y);
      this.hooks.change();
    } else if ((event.key === "Delete" || event.key === "Backspace") && index >= 0) {
      this.hooks.remove(objects[index].id);
    } else {
      return;
    }
    event.preventDefault();
  }

  paint() {
    const context = this.canvas.getContext("2d"), {width, height} = this.canvas, view = this.hooks.view();
    const scale = window.devicePixelRatio || 1, at = ([x0, y0, x1, y1]) =>
      [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height];
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.globalAlpha = view.isFaded ? 0.35 : 1;
    if (view.picture) context.drawImage(view.picture, 0, 0, width, height);
    context.globalAlpha = 1;
    for (const box of view.hole) hatch(context, at(box), scale);
    if (view.boxes) {
      const last = (object) => object.id === this.hooks.selected() ? 1 : 0;
      for (const object of [...this.hooks.objects()].sort((one, other) => last(one) - last(other))) {
        const isSelected = object.id === this.hooks.selected();
        outline(context, at(object.bbox), colourOf(object), scale, isSelected);
        plate(context, at(object.bbox), object.phrase || object.label || "?", colourOf(object), scale);
        if (isSelected) {
          for (const [i, j] of CORNERS) handle(context, object.bbox[i] * width, object.bbox[j] * height, scale);
        }
      }
      if (this.drag && this.drag.box) outline(context, at(this.drag.box), "hsl(0 0% 40%)", scale, true);
    }
    for (const {label, bbox, score} of view.found) {
      context.setLineDash([5 * scale, 4 * scale]);
      outline(context, at(bbox), "hsl(45 100% 60%)", scale, false);
      context.setLineDash([]);
      const [x, y, w, h] = at(bbox);
      plate(context, [x, y + h - 20 * scale, w, h], `${label} ${score.toFixed(2)}`, "hsl(40 90% 32%)", scale);
    }
  }
}

function shifted([x0, y0, x1, y1], x, y) {
  const across = Math.min(1 - x1, Math.max(-x0, x)), down = Math.min(1 - y1, Math.max(-y0, y));
  const left = rounded(x0 + across), top = rounded(y0 + down);
  return [left, top, rounded(left + x1 - x0), rounded(top + y1 - y0)];
}

function resized(box, [i, j], [x, y]) {
  const ends = [...box];
  ends[i] = i === 0 ? Math.min(rounded(x), rounded(box[2] - SMALLEST)) : Math.max(rounded(x), rounded(box[0] + SMALLEST));
  ends[j] = j === 1 ? Math.min(rounded(y), rounded(box[3] - SMALLEST)) : Math.max(rounded(y), rounded(box[1] + SMALLEST));
  return ends;
}

function outline(context, [x, y, width, height], colour, scale, isStrong) {
  context.lineWidth = (isStrong ? 5 : 4) * scale;
  context.strokeStyle = "hsl(0 0% 100% / .8)";
  context.strokeRect(x, y, width, height);
  context.lineWidth = (isStrong ? 3 : 2) * scale;
  context.strokeStyle = colour;
  context.strokeRect(x, y, width, height);
}

function plate(context, [x, y, , height], text, colour, scale) {
  context.font = `600 ${13 * scale}px system-ui, sans-serif`;
  const pad = 5 * scale, tall = 20 * scale, limit = context.canvas.width;
  let shown = text;
  while (shown.length > 1 && context.measureText(shown).width + 2 * pad > limit) shown = shown.slice(0, -2) + "…";
  const wide = context.measureText(shown).width + 2 * pad;
  const left = Math.max(0, Math.min(x, limit - wide)), top = y >= tall ? y - tall : Math.min(y, y + height - tall);
  context.fillStyle = colour;
  context.fillRect(left, Math.max(0, top), wide, tall);
  context.fillStyle = "#fff";
  context.textBaseline = "middle";
  context.fillText(shown, left + pad, Math.max(0, top) + tall / 2 + scale);
}

function handle(context, x, y, scale) {
  const side = HANDLE * scale;
  context.fillStyle = "#fff";
  context.strokeStyle = "#222";
  context.lineWidth = 1.5 * scale;
  context.fillRect(x - side / 2, y - side / 2, side, side);
  context.strokeRect(x - side / 2, y - side / 2, side, side);
}

function hatch(context, [x, y, width, height], scale) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = "hsl(0 0% 100% / .35)";
  context.fillRect(x, y, width, height);
  context.strokeStyle = "hsl(0 0% 0% / .4)";
  context.lineWidth = scale;
  const step = 9 * scale, base = Math.floor((x + y) / step) * step;  // one pattern for all boxes
  context.beginPath();
  for (let sum = base; sum < x + width + y + height; sum += step) {
    context.moveTo(sum - y, y);
    context.lineTo(sum - y - height, y + height);
  }
  context.stroke();
  context.restore();
}
