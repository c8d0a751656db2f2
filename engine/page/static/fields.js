// The options of a picture as form fields. Each reads and writes one value of the page's state by its name.

import {same} from "./edit.js";

const AUTO = {mask_threshold: 0.5, start_step: 3, auto_update: false};
const NOT_AUTO = {mask_threshold: null, start_step: null, auto_update: false};

// Values of the state by name: a path into it, or "speed" and "auto", which stand for several.
export class Values {
  constructor(state, facts) {
    Object.assign(this, {state, facts});
  }

  get(name) {
    if (name === "speed") return this.speed();
    if (name === "auto") return this.state.options.mask_threshold !== null;
    return name.split(".").reduce((value, key) => value[key], this.state);
  }

  set(name, value) {
    if (name === "speed") {
      const {precision, ...options} = this.facts.speeds[value];
      this.state.precision = precision;
      Object.assign(this.state.options, options);
    } else if (name === "auto") {
      Object.assign(this.state.options, value ? AUTO : NOT_AUTO);
    } else {
      const keys = name.split("."), last = keys.pop();
      keys.reduce((holder, key) => holder[key], this.state)[last] = value;
    }
  }

  speed() {  // the preset that the options are those of; "" for none
    const plain = {...this.state.options, precision: this.state.precision};
    const fits = ([, preset]) => Object.entries(preset).every(([key, value]) => same(plain[key], value));
    return (Object.entries(this.facts.speeds).find(fits) || [""])[0];
  }
}

const range = (name, label, min, max, step, more = {}) => ({kind: "range", name, label, min, max, step, ...more});
const whole = (name, label, min, max, more = {}) => ({kind: "number", name, label, min, max, step: 1, ...more});

// None for weights that have guidance trained into them.
function guidanceFields(facts) {
  const title = "How strictly the picture follows it; 1: no guidance";
  const names = [["options.cfg_text", "Caption guidance"], ["options.cfg_layout", "Box guidance"]];
  return facts.has_guidance ? names.map(([name, label]) => range(name, label, 0, 12, 0.5, {title})) : [];
}

export function mainFields(facts) {
  return [
    {kind: "seed", name: "seed", label: "Seed", min: 0, max: facts.limits.seed},
    whole("num_images", "Pictures in a row", 1, facts.limits.images, {title: "with the seeds that follow"}),
    {kind: "select", name: "speed", label: "Speed", choices: Object.keys(facts.speeds)},
    ...guidanceFields(facts),
    range("options.num_iter", "Iterations", 1, facts.num_tokens, 1),
  ];
}

// auto: whether boxes follow the caption's attention.
export function moreFields(facts, auto) {
  const isDiffusion = facts.head === "diffusion";
  return [
    facts.has_guidance ? {kind: "text", name: "options.negative_prompt", label: "Rather not", title: "What guidance by the caption leads away from", limit: facts.limits.text} : null,
    isDiffusion ? whole("options.num_sampling_steps", "Diffusion steps", 1, 1000) : null,
    range("options.temperature", "Temperature", isDiffusion ? 0 : 0.05, 2, 0.05),
    range("options.layout_scale", "Strength of boxes", 0, 2, 0.05, {title: "Of those without one of their own; 1 as trained"}),
    range("options.layout_schedule.0", "Boxes count until", 0, 1, 0.05, {title: "This share of the picture is visible; 1: always"}),
    range("options.layout_schedule.1", "… and fade over", 0, 1, 0.05, {title: "So much more of it"}),
    {kind: "check", name: "options.drop_grounding_tokens", label: "Leave boxes out", title: "Only the caption counts; with the next option, boxes that it names come in later"},
    {kind: "check", name: "auto", label: "Boxes follow words", title: "From an iteration on, a box reaches where the caption's attention to its name is high"},
    range("options.mask_threshold", "… above this share", 0, 0.95, 0.05, {when: auto}),
    whole("options.start_step", "… from iteration", 1, facts.num_tokens - 1, {when: auto}),
    {kind: "check", name: "options.auto_update", label: "… anew in each", when: auto},
  ].filter(Boolean);
}

export function fieldOf(field, get, set) {
  const {row, refresh} = rowOf(field, get, set);
  return {row, refresh: () => { row.hidden = Boolean(field.when) && !field.when(); refresh(); }};
}

function rowOf(field, get, set) {
  const row = document.createElement("div"), label = document.createElement("label");
  row.className = field.kind === "range" ? "field" : "field two";
  label.textContent = field.label;
  label.htmlFor = "field-" + field.name;
  if (field.title) row.title = field.title;
  const {element, refresh} = MAKERS[field.kind](field, get, set);
  const control = element.matches("input, select") ? element : element.querySelector("input, select");
  control.id = label.htmlFor;
  row.append(label, element);
  if (field.kind === "range") {
    const shown = document.createElement("output");
    row.append(shown);
    return {row, refresh: () => { refresh(); shown.value = get(); }};
  }
  return {row, refresh};
}

function input(field, type, get, read, set) {
  const element = document.createElement("input");
  element.type = type;
  if (field.limit) element.maxLength = field.limit;
  for (const name of ["min", "max", "step"]) if (field[name] !== undefined) element[name] = field[name];
  element.addEventListener("input", () => { const value = read(element); if (value !== undefined) set(value); });
  element.addEventListener("change", () => { element.value = get() ?? ""; });
  const refresh = () => { if (read(element) !== get()) element.value = get() ?? ""; };  // what is being typed stays
  return {element, refresh};
}

const numberIn = (element) => element.value !== "" && element.checkValidity() ? Number(element.value) : undefined;

const MAKERS = {
  range: (field, get, set) => input(field, "range", get, (element) => Number(element.value), set),
  number: (field, get, set) => input(field, "number", get, numberIn, set),
  text: (field, get, set) => input(field, "text", get, (element) => element.value || null, set),
  check(field, get, set) {
    const element = document.createElement("input");
    element.type = "checkbox";
    element.style.justifySelf = "start";
    element.addEventListener("change", () => set(element.checked));
    return {element, refresh: () => { element.checked = get(); }};
  },
  select(field, get, set) {
    const element = document.createElement("select");
    const custom = new Option("as set below", "");
    for (const choice of field.choices) element.append(new Option(choice, choice));
    custom.hidden = true;
    element.append(custom);
    element.addEventListener("change", () => set(element.value));
    return {element, refresh: () => { element.value = get(); }};
  },
  seed(field, get, set) {
    const {element, refresh} = input({...field, step: 1}, "number", get, numberIn, set);
    const pair = document.createElement("div"), dice = document.createElement("button");
    pair.className = "pair";
    dice.textContent = "Other";
    dice.title = "Another seed at random";
    dice.addEventListener("click", () => { set(Math.floor(Math.random() * 2 ** 31)); refresh(); });
    pair.append(element, dice);
    return {element: pair, refresh};
  },
};
