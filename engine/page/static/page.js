// The page: its state, and what connects it to the form, the canvas (boxes.js) and the server (net.js).

import {BoxCanvas, colourOf} from "./boxes.js";
import {fieldOf, mainFields, moreFields} from "./fields.js";
import {ask, base64Of, facts as readFacts, follow, pngUrl, save, saveText} from "./net.js";

const $ = (id) => document.getElementById(id);
const MAX_PICTURES = 48, MAX_UNDO = 100, GOOD = 0.5;
const AUTO = {mask_threshold: 0.5, start_step: 3, auto_update: false};
const NOT_AUTO = {mask_threshold: null, start_step: null, auto_update: false};
const clone = (value) => JSON.parse(JSON.stringify(value));

let facts, canvas, fields = [];
let nextId = 0, selected = null, mode = "new", job = null, growing = null;
let pictures = [], current = null;  // what was drawn or opened, and the one that is shown
let base = null, forcedHole = null;  // of edit mode: the picture that is edited; a hole that a file names
let rows = [], shownRows = "";  // of the objects, and what they say
let undone = [], proposed = null;  // proposed: the caption and seed that the last layout was proposed for
const state = {prompt: "", objects: [], seed: 0, num_images: 1, options: {}, precision: "fp32", size: null};
// An object: {id, hue, label, phrase, scale, bbox, edit}. hue: its colour's number. edit: drawn anew where it stands. label "": the background.

// What is drawn anew in edit mode

const originOf = (object) => base && base.objects.find((each) => each.id === object.id);
const removedOnes = () => mode === "edit" ? base.objects.filter((each) => !state.objects.some((other) => other.id === each.id)) : [];
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

function changeOf(object) {
  const origin = originOf(object);
  if (!origin) return "new";
  if (!same(origin.bbox, object.bbox)) return "moved";
  if (origin.label !== object.label || origin.phrase !== object.phrase) return "changed";
  return object.edit ? "repainted" : "";
}

function holes() {
  if (mode !== "edit" || !base) return [];
  if (forcedHole) return forcedHole;
  const found = removedOnes().map((each) => each.bbox);
  for (const object of state.objects) {
    const change = changeOf(object);
    if (change === "moved") found.push(originOf(object).bbox);
    if (change) found.push(object.bbox);
  }
  return found;
}

// All cells that a box touches: these are drawn anew.
function cellsOf(box) {
  const [rows, columns] = facts.grid, slack = 1e-4;
  const low = (share, count) => Math.floor(share * count + slack) / count;
  const high = (share, count) => Math.ceil(share * count - slack) / count;
  return [low(box[0], columns), low(box[1], rows), high(box[2], columns), high(box[3], rows)];
}

// Changes of the layout

function begin() {
  undone.push(clone({prompt: state.prompt, objects: state.objects}));
  if (undone.length > MAX_UNDO) undone.shift();
}

function change() {
  forcedHole = null;
  refresh();
}

function undo() {
  const before = undone.pop();
  if (before) {
    Object.assign(state, before);
    change();
  }
}

// Rows are left as they are: a click or a menu in one may have begun.
function select(id) {
  selected = id;
  for (const {row, object} of rows) row.classList.toggle("selected", object.id === id);
  canvas.paint();
}

function addBox(bbox) {
  if (state.objects.length >= facts.max_objects) return complain(`These weights place at most ${facts.max_objects} boxes.`);
  begin();
  const last = state.objects.at(-1);
  const used = state.objects.map((each) => each.hue), hue = [...used.keys(), used.length].find((each) => !used.includes(each));
  const object = {id: nextId++, hue, label: last && last.label || facts.labels[0] || "", phrase: "", scale: 1, bbox, edit: false};
  state.objects.push(object);
  selected = object.id;
  change();
  $(`label-${object.id}`).focus({preventScroll: true});
}

function removeBox(id) {
  begin();
  state.objects = state.objects.filter((each) => each.id !== id);
  selected = null;
  change();
}

function takeScene(scene) {
  state.prompt = scene.prompt;
  state.size = scene.height ? [scene.height, scene.width] : null;
  state.objects = scene.objects.map(({label, phrase, scale, bbox, edit}, hue) =>
    ({id: nextId++, hue, label: facts.labels.includes(label) ? label : "", phrase: phrase || (facts.labels.includes(label) ? "" : label),
      scale: scale ?? 1, bbox, edit: edit || false}));
  selected = null;
}

function entryOf(objects) {
  const entry = {prompt: state.prompt, objects: []};
  for (const {label, phrase, scale, bbox} of objects) {
    const item = {label: label || phrase, bbox};
    if (phrase && label) item.phrase = phrase;
    if (scale !== 1) item.scale = scale;
    entry.objects.push(item);
  }
  if (state.size) [entry.height, entry.width] = state.size;
  return entry;
}

// Pictures

async function imageOf(png) {
  const image = new Image();
  image.src = pngUrl(png);
  await image.decode();
  return image;
}

function keep(picture) {
  pictures.push(picture);
  if (pictures.length > MAX_PICTURES) pictures.shift();
  show(picture);
}

function show(picture) {
  current = picture;
  growing = null;
  if (mode === "edit") startEdit();
}

// A picture of the strip with all that it was drawn with.
function recall(picture) {
  begin();
  state.prompt = picture.prompt;
  state.size = picture.size;
  state.objects = clone(picture.objects);
  if (picture.options) {
    state.options = clone(picture.options);
    state.precision = picture.precision;
    state.seed = picture.seed;
  }
  selected = null;
  show(picture);
  refresh();
}

function startEdit() {
  base = current;
  forcedHole = null;
  for (const object of state.objects) object.edit = false;
}

function setMode(next) {
  mode = next;
  if (mode === "edit") startEdit();
  else base = null;
  refresh();
}

function requested() {
  const named = state.objects.filter((object) => object.label || object.phrase);
  if (mode === "new" && named.length < state.objects.length) {
    throw new Error(`Say what box ${state.objects.findIndex((each) => !named.includes(each)) + 1} holds.`);
  }
  const body = {scene: entryOf(named), seed: state.seed, num_images: state.num_images, precision: state.precision, options: state.options};
  if (mode === "edit") body.edit = {picture: base.png, boxes: holes()};
  return {body, made: {prompt: state.prompt, size: state.size, objects: clone(named), options: clone(state.options),
    precision: state.precision, source: mode === "edit" ? base.png : null}};
}

async function draw() {
  if (job) return;
  complain("");
  try {
    const {body, made} = requested();
    job = {controller: new AbortController(), number: 0, drawn: [], of: state.num_images};
    refresh();
    await follow("/draw", body, job.controller.signal, (event) => heard(event, made));
    await Promise.all(job.drawn);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else complain(error.message);
  }
  job = growing = null;
  refresh();
}

function heard(event, made) {
  const own = job;
  if (event.event === "waiting") {
    say(`Waiting for ${event.ahead} ${event.ahead === 1 ? "other request" : "other requests"}.`);
  } else if (event.event === "step") {
    say(`Picture ${event.image + 1} of ${own.of}, iteration ${event.iteration} of ${event.iterations}`);
    $("progress").value = (event.image + event.iteration / event.iterations) / own.of;
    const number = ++own.number;
    if (event.picture) imageOf(event.picture).then((image) => {
      if (job === own && number > (growing ? growing.number : -1)) {
        growing = {image, number};
        canvas.paint();
      }
    });
  } else if (event.event === "picture") {
    own.number++;
    own.drawn.push(imageOf(event.png).then((image) => {
      const picture = {...made, objects: clone(made.objects), image, png: event.png, seed: event.seed, ious: event.ious || null,
        found: event.found || [], command: null};
      own.pictures = [...(own.pictures || []), picture];
      pictures.push(picture);
      if (pictures.length > MAX_PICTURES) pictures.shift();
      current = picture;
      growing = null;
      refresh();
    }));
  } else if (event.event === "done") {
    own.drawn.push(Promise.all(own.drawn).then(() => {
      for (const picture of own.pictures) picture.command = event.command;
      show(own.pictures[0]);
      const each = own.of > 1 ? `, ${(event.seconds / own.of).toFixed(1)} s each` : "";
      say(`${own.of} ${own.of === 1 ? "picture" : "pictures"} in ${event.seconds.toFixed(1)} s${each}.`);
    }));
  }
}

function say(text) { $("status").textContent = text; }
function complain(text) { $("error").textContent = text; }

// Another layout with every press.
async function propose() {
  complain("");
  const seed = state.seed + (proposed && proposed.prompt === state.prompt && proposed.base === state.seed ? proposed.count : 0);
  $("propose").disabled = true;
  try {
    const scene = await ask("/propose", {prompt: state.prompt, seed});
    proposed = {prompt: state.prompt, base: state.seed, count: seed - state.seed + 1};
    begin();
    takeScene(scene);
    change();
    say(scene.objects.length ? "A layout for this caption; press again for another." : "The planner places nothing for this caption.");
  } catch (error) {
    complain(error.message);
  }
  $("propose").disabled = false;
}

// Files

async function open(file) {
  complain("");
  try {
    const found = await ask("/open", {content: base64Of(await file.arrayBuffer())});
    begin();
    mode = "new";
    if (found.scenes) takeScene(found.scenes[0]);
    if (found.scenes && found.scenes.length > 1) offer(found.scenes, file.name);
    if (found.seed !== undefined) state.seed = found.seed;
    if (found.options) state.options = found.options;
    if (found.precision) state.precision = found.precision;
    if (found.picture) await takePicture(found);
    say(found.options ? "The picture with all that it was drawn with." : found.picture ? "Draw a box where the picture is to change." :
      `${found.scenes.length} ${found.scenes.length === 1 ? "layout" : "layouts, the first is shown; the others are among the examples"}.`);
  } catch (error) {
    complain(error.message);
  }
  refresh();
}

async function takePicture(found) {
  const isOurs = Boolean(found.scenes), image = await imageOf(found.picture);
  if (found.edit) {
    const source = {prompt: state.prompt, size: null, objects: [], image: await imageOf(found.edit.picture), png: found.edit.picture,
      found: []};
    pictures.push(source);
    current = source;
    setMode("edit");
    forcedHole = found.edit.boxes;
  }
  if (!isOurs) state.objects = [];
  const picture = {prompt: state.prompt, size: state.size, objects: clone(state.objects), image, png: found.picture, found: [],
    options: isOurs ? clone(state.options) : null, precision: state.precision, seed: state.seed};
  pictures.push(picture);
  current = picture;
  if (!isOurs) setMode("edit");
}

function offer(scenes, title) {
  const group = document.createElement("optgroup");
  group.label = title;
  for (const scene of scenes) {
    const option = new Option(scene.prompt || "(no caption)");
    option.scene = scene;
    group.append(option);
  }
  $("examples").append(group);
}

// What is shown of the state

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// What the rows of the objects say. They are made anew only where that changes from outside them: a row that is being
// used stays.
function rowsNow() {
  return JSON.stringify([mode, state.objects.map((each) =>
    [each.id, each.label, each.phrase, each.scale, each.edit, Boolean(originOf(each))])]);
}

function changedInRow() {
  shownRows = rowsNow();
  change();
}

function objectRow(object, index) {
  const row = element("li", {className: object.id === selected ? "selected" : ""}), badge = element("span");
  row.style.setProperty("--hue", colourOf(object));
  for (const name of ["pointerdown", "focusin"]) row.addEventListener(name, () => { if (selected !== object.id) select(object.id); });
  const label = element("select", {id: `label-${object.id}`, ariaLabel: `What box ${index + 1} holds`});
  if (mode === "edit" || facts.has_phrases || !object.label) {
    label.append(new Option(facts.has_phrases ? "in words:" : mode === "edit" ? "the background" : "choose", ""));
  }
  for (const name of facts.labels) label.append(new Option(name, name));
  label.value = object.label;
  label.addEventListener("change", () => { begin(); object.label = label.value; changedInRow(); });
  const remove = element("button", {textContent: "×", title: "Remove this box (Delete)", ariaLabel: `Remove box ${index + 1}`});
  remove.addEventListener("click", () => removeBox(object.id));
  row.append(element("div", {className: "row"}, label, badge, remove));
  if (facts.has_phrases) row.append(phraseOf(object, index));
  row.append(element("div", {className: "row spread"}, strengthOf(object, index),
    ...(mode === "edit" && originOf(object) ? [repaintOf(object)] : [])));
  return {row, object, badge};
}

function badgeOf(object) {
  const change = mode === "edit" ? changeOf(object) : "";
  if (change) return element("span", {className: "badge", textContent: change});
  const index = current && current.ious ? current.objects.findIndex((each) => each.id === object.id) : -1;
  const iou = index < 0 ? null : current.ious[index];
  if (iou === null || !same(current.objects[index].bbox, object.bbox)) return null;
  const title = "Intersection over union of this box and what a detector finds; 1 is exact";
  return element("span", {className: `badge ${iou >= GOOD ? "good" : "poor"}`, textContent: iou ? `IoU ${iou.toFixed(2)}` : "not found", title});
}

function phraseOf(object, index) {
  const phrase = element("input", {type: "text", value: object.phrase, maxLength: facts.limits.phrase, ariaLabel: `Box ${index + 1} in words`,
    placeholder: "in words, such as: large red umbrella"});
  phrase.addEventListener("focus", begin);
  phrase.addEventListener("input", () => { object.phrase = phrase.value.trim(); changedInRow(); });
  return phrase;
}

function strengthOf(object, index) {
  const title = "How strongly this box counts; 1 as trained, 0 not at all";
  const strength = element("input", {type: "number", min: 0, max: facts.limits.scale, step: 0.1, value: object.scale, title,
    ariaLabel: `Strength of box ${index + 1}`});
  strength.addEventListener("focus", begin);
  strength.addEventListener("input", () => {
    if (strength.value === "" || !(strength.valueAsNumber >= 0 && strength.valueAsNumber <= facts.limits.scale)) return;
    object.scale = strength.valueAsNumber;
    changedInRow();
  });
  return element("label", {className: "strength", title}, "Strength", strength);
}

function repaintOf(object) {
  const box = element("input", {type: "checkbox", checked: object.edit});
  box.addEventListener("change", () => { begin(); object.edit = box.checked; changedInRow(); });
  return element("label", {className: "check"}, box, "Repaint it");
}

function removedRow(object) {
  const back = element("button", {textContent: "Put back"});
  back.addEventListener("click", () => { begin(); state.objects.push(clone(object)); change(); });
  return element("li", {}, element("span", {className: "grow", textContent: `${object.phrase || object.label}: removed`}), back);
}

function thumb(picture) {
  const made = element("button", {title: picture.prompt || "no caption", ariaPressed: picture === current},
    element("img", {src: picture.image.src, alt: picture.prompt}),
    element("span", {textContent: picture.options ? `seed ${picture.seed}${picture.source ? ", edited" : ""}` : "opened"}));
  made.addEventListener("click", () => recall(picture));
  return made;
}

function refresh() {
  const isFree = !job;
  if ($("prompt").value !== state.prompt) $("prompt").value = state.prompt;
  refreshRows();
  $("count").textContent = `${state.objects.length} of ${facts.max_objects}`;
  $("no-objects").hidden = state.objects.length > 0;
  $("add").disabled = state.objects.length >= facts.max_objects;
  for (const field of fields) field.refresh();
  const edit = document.querySelector("input[name=mode][value=edit]");
  edit.disabled = !current || !isFree;
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
  const hasHole = mode === "new" || holes().length > 0;
  $("draw").textContent = mode === "edit" ? "Redraw" : "Draw";
  $("draw").disabled = !hasHole;
  $("draw").hidden = !isFree;
  $("stop").hidden = isFree;
  $("progress").hidden = isFree;
  if (isFree) $("progress").value = 0;
  $("hint").hidden = hasHole || !isFree;
  $("undo").disabled = undone.length === 0;
  $("show-found-label").hidden = !facts.has_detector;
  $("strip").replaceChildren(...pictures.map(thumb));
  $("save-png").disabled = !current;
  const command = current && current.command;
  $("again").hidden = !command;
  $("command").textContent = command || "";
  $("save-source").hidden = !(current && current.source);
  $("again-files").textContent = command ? filesFor(command) : "";
  canvas.paint();
}

function refreshRows() {
  if (shownRows !== rowsNow() || rows.some(({object}, index) => object !== state.objects[index])) {
    const focused = document.activeElement && document.activeElement.id;
    rows = state.objects.map(objectRow);
    $("objects").replaceChildren(...rows.map(({row}) => row));
    if (focused && focused.startsWith("label-") && $(focused)) $(focused).focus({preventScroll: true});
    shownRows = rowsNow();
  }
  for (const {row, object, badge} of rows) {
    row.classList.toggle("selected", object.id === selected);
    const found = badgeOf(object);
    badge.replaceChildren(...(found ? [found] : []));
  }
  $("removed").replaceChildren(...removedOnes().map(removedRow));
}

function filesFor(command) {
  const names = [facts.files.layout, facts.files.source].filter((name) => command.includes(name));
  return names.length ? `It reads ${names.join(" and ")}, which the buttons here save.` : "";
}

// Whether the boxes are others than those of the picture that is shown.
function isOutdated() {
  const plain = (objects) => objects.map(({label, phrase, scale, bbox}) => ({label, phrase, scale, bbox}));
  return mode === "new" && !job && current !== null && !same(plain(current.objects), plain(state.objects));
}

function view() {
  const shown = mode === "edit" && !job ? base : current;
  return {
    picture: growing ? growing.image : job && !job.pictures ? (mode === "edit" ? base.image : null) : shown && shown.image,
    isFaded: isOutdated(),
    boxes: $("show-boxes").checked,
    hole: job ? [] : holes().map(cellsOf),
    found: $("show-found").checked && current && !job ? current.found : [],
  };
}

// The start

const isAuto = () => state.options.mask_threshold !== null;

// name: a path into the state, or one of two that stand for several values.
function valueOf(name) {
  if (name === "speed") return speedNow();
  if (name === "auto") return isAuto();
  return name.split(".").reduce((value, key) => value[key], state);
}

function setValue(name, value) {
  if (name === "speed") {
    for (const [key, each] of Object.entries(facts.speeds[value] || {})) {
      if (key === "precision") state.precision = each;
      else state.options[key] = each;
    }
  } else if (name === "auto") {
    Object.assign(state.options, value ? AUTO : NOT_AUTO);
  } else {
    const keys = name.split("."), last = keys.pop();
    keys.reduce((holder, key) => holder[key], state)[last] = value;
  }
  for (const field of fields) field.refresh();
}

function speedNow() {
  const plain = {...state.options, precision: state.precision};
  const fits = ([, preset]) => Object.entries(preset).every(([key, value]) => same(plain[key], value));
  return (Object.entries(facts.speeds).find(fits) || [""])[0];
}

function takeDefaults() {
  state.options = clone(facts.options);
  state.precision = facts.precision;
}

function connect() {
  $("prompt").addEventListener("focus", begin);
  $("prompt").addEventListener("input", () => { state.prompt = $("prompt").value; });
  $("draw").addEventListener("click", draw);
  $("stop").addEventListener("click", () => job && job.controller.abort());
  $("propose").hidden = !facts.has_planner;
  $("propose").addEventListener("click", propose);
  $("undo").addEventListener("click", undo);
  $("add").addEventListener("click", () => addBox([0.3, 0.3, 0.7, 0.7]));
  $("reset").addEventListener("click", () => { takeDefaults(); refresh(); });
  for (const id of ["show-boxes", "show-found"]) $(id).addEventListener("change", () => canvas.paint());
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.addEventListener("change", () => setMode(radio.value));
  $("examples").addEventListener("change", () => {
    const {scene} = $("examples").selectedOptions[0];
    if (!scene) return;
    begin();
    takeScene(scene);
    setMode("new");
    $("examples").selectedIndex = 0;
  });
  $("open").addEventListener("change", () => { if ($("open").files[0]) open($("open").files[0]); $("open").value = ""; });
  $("save-layout").addEventListener("click", () =>
    saveText(facts.files.layout, JSON.stringify(entryOf(state.objects.filter((each) => each.label || each.phrase)), null, 2) + "\n"));
  $("save-png").addEventListener("click", () => current && save(`seed-${current.seed}.png`, pngUrl(current.png)));
  $("save-source").addEventListener("click", () => save(facts.files.source, pngUrl(current.source)));
  $("copy").addEventListener("click", () => navigator.clipboard.writeText($("command").textContent).then(() => say("Copied.")));
  document.addEventListener("keydown", (event) => {
    const isText = event.target.matches("textarea, input[type=text], input[type=number]");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
    else if (event.key === "Escape" && job) job.controller.abort();
    else if (event.key === "z" && (event.ctrlKey || event.metaKey) && !isText) undo();
    else return;
    event.preventDefault();
  });
}

async function start() {
  facts = await readFacts();
  $("weights").textContent = facts.weights;
  $("weights").title = facts.weights;
  $("prompt").maxLength = facts.limits.text;
  canvas = new BoxCanvas($("canvas"), {objects: () => state.objects, selected: () => selected, select, add: addBox, begin, change,
    remove: removeBox, view});
  for (const [id, list] of [["main-fields", mainFields(facts)], ["more-fields", moreFields(facts, isAuto)]]) {
    for (const each of list) {
      const field = fieldOf(each, () => valueOf(each.name), (value) => setValue(each.name, value));
      fields.push(field);
      $(id).append(field.row);
    }
  }
  $("examples").append(new Option("Examples"));
  offer(facts.examples, "Scenes");
  takeDefaults();
  connect();
  if (facts.examples.length) takeScene(facts.examples[0]);
  canvas.setSize(facts.size);
  refresh();
}

start().catch((error) => complain(error.message));
