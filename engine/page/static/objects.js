// The list of objects beside the picture: what each box holds, in words too, and how strongly it counts.
// Rows are made anew only where what they say changes from outside them: one that is being used stays as it is.

import {colourOf} from "./boxes.js";
import {changeOf, originIn, same} from "./edit.js";

const GOOD = 0.5;  // IoU

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export class ObjectList {
  // hooks: objects(), selected(), mode(), base(), shown(), removed(), select(id), begin(), change(), remove(id), putBack(object)
  constructor(facts, place, removedPlace, hooks) {
    Object.assign(this, {facts, place, removedPlace, hooks, rows: [], said: ""});
  }

  select() {
    for (const {row, object} of this.rows) row.classList.toggle("selected", object.id === this.hooks.selected());
  }

  refresh() {
    const objects = this.hooks.objects();
    if (this.said !== this.says() || this.rows.some(({object}, index) => object !== objects[index])) {
      const focused = document.activeElement && document.activeElement.id;
      this.rows = objects.map((object, index) => this.rowOf(object, index));
      this.place.replaceChildren(...this.rows.map(({row}) => row));
      const again = focused && focused.startsWith("label-") && document.getElementById(focused);
      if (again) again.focus({preventScroll: true});
      this.said = this.says();
    }
    for (const {object, badge} of this.rows) badge.replaceChildren(...this.badgeOf(object));
    this.select();
    this.removedPlace.replaceChildren(...this.hooks.removed().map((object) => this.removedRow(object)));
  }

  says() {
    return JSON.stringify([this.hooks.mode(), this.hooks.objects().map((each) =>
      [each.id, each.label, each.phrase, each.scale, each.edit, this.isOfBase(each)])]);
  }

  isOfBase(object) {
    return Boolean(originIn(this.hooks.base(), object));
  }

  changed() {  // in a row
    this.said = this.says();
    this.hooks.change();
  }

  rowOf(object, index) {
    const row = element("li"), badge = element("span");
    row.style.setProperty("--hue", colourOf(object));
    for (const name of ["pointerdown", "focusin"]) {
      row.addEventListener(name, () => { if (this.hooks.selected() !== object.id) this.hooks.select(object.id); });
    }
    const remove = element("button", {textContent: "×", title: "Remove this box (Delete)", ariaLabel: `Remove box ${index + 1}`});
    remove.addEventListener("click", () => this.hooks.remove(object.id));
    row.append(element("div", {className: "row"}, this.labelOf(object, index), badge, remove));
    if (this.facts.has_phrases) row.append(this.phraseOf(object, index));
    row.append(element("div", {className: "row spread"}, this.strengthOf(object, index),
      ...(this.isOfBase(object) ? [this.repaintOf(object)] : [])));
    return {row, object, badge};
  }

  labelOf(object, index) {
    const label = element("select", {id: `label-${object.id}`, ariaLabel: `What box ${index + 1} holds`});
    const isEdit = this.hooks.mode() === "edit", hasPhrases = this.facts.has_phrases;
    if (isEdit || hasPhrases || !object.label) {
      label.append(new Option(hasPhrases ? "in words:" : isEdit ? "the background" : "choose", ""));
    }
    for (const name of this.facts.labels) label.append(new Option(name, name));
    label.value = object.label;
    label.addEventListener("change", () => { this.hooks.begin(); object.label = label.value; this.changed(); });
    return label;
  }

  phraseOf(object, index) {
    const phrase = element("input", {type: "text", value: object.phrase, maxLength: this.facts.limits.phrase,
      ariaLabel: `Box ${index + 1} in words`, placeholder: "in words, such as: large red umbrella"});
    phrase.addEventListener("focus", () => this.hooks.begin());
    phrase.addEventListener("input", () => { object.phrase = phrase.value.trim(); this.changed(); });
    return phrase;
  }

  strengthOf(object, index) {
    const title = "How strongly this box counts; 1 as trained, 0 not at all", max = this.facts.limits.scale;
    const strength = element("input", {type: "number", min: 0, max, step: 0.1, value: object.scale, title,
      ariaLabel: `Strength of box ${index + 1}`});
    strength.addEventListener("focus", () => this.hooks.begin());
    strength.addEventListener("input", () => {
      const value = strength.valueAsNumber;  // NaN for what is none
      if (value >= 0 && value <= max) {
        object.scale = value;
        this.changed();
      }
    });
    return element("label", {className: "strength", title}, "Strength", strength);
  }

  repaintOf(object) {
    const box = element("input", {type: "checkbox", checked: object.edit});
    box.addEventListener("change", () => { this.hooks.begin(); object.edit = box.checked; this.changed(); });
    return element("label", {className: "check"}, box, "Repaint it");
  }

  badgeOf(object) {
    const base = this.hooks.base(), change = base ? changeOf(base, object) : "";
    if (change) return [element("span", {className: "badge", textContent: change})];
    const shown = this.hooks.shown();
    const index = shown && shown.ious ? shown.objects.findIndex((each) => each.id === object.id) : -1;
    const iou = index < 0 ? null : shown.ious[index];
    if (iou === null || !same(shown.objects[index].bbox, object.bbox)) return [];
    const title = "Intersection over union of this box and what a detector finds; 1 is exact";
    const textContent = iou ? `IoU ${iou.toFixed(2)}` : "not found";
    return [element("span", {className: `badge ${iou >= GOOD ? "good" : "poor"}`, textContent, title})];
  }

  removedRow(object) {
    const back = element("button", {textContent: "Put back"});
    back.addEventListener("click", () => this.hooks.putBack(object));
    return element("li", {}, element("span", {className: "grow", textContent: `${object.phrase || object.label}: removed`}), back);
  }
}
