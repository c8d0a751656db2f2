// The page: its state, and what connects it to the form, the canvas (boxes.js) and the server (net.js).

import {BoxCanvas} from "./boxes.js";
import {cellsOf, holesOf, removedFrom, same} from "./edit.js";
import {fieldOf, mainFields, moreFields, Values} from "./fields.js";
import {ask, base64Of, facts as readFacts, follow, pngUrl, save, saveText} from "./net.js";
import {element, ObjectList} from "./objects.js";
import {entryOf, objectsOf} from "./scene.js";

const $ = (id) => document.getElementById(id);
const MAX_PICTURES = 48, MAX_UNDO = 100;
const clone = (value) => JSON.parse(JSON.stringify(value));

let facts, canvas, list, fields = [];
let nextId = 0, selected = null, mode = "new", job = null, growing = null;
let pictures = [], current = null;  // what was drawn or opened, and the one that is shown
let base = null, forcedHole = null;  // of edit mode: the picture that is edited; a hole that a file names
let shownPictures = [], nextNumber = 0;  // in the strip
let undone = [], proposed = null;  // proposed: the caption and seed that the last layout was proposed for
const state = {prompt: "", objects: [], seed: 0, num_images: 1, options: {}, precision: "fp32", size: null};

const removedOnes = () => removedFrom(mode === "edit" ? base : null, state.objects);
const holes = () => forcedHole && mode === "edit" ? forcedHole : holesOf(mode === "edit" ? base : null, state.objects);

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
  let before = undone.pop();
  while (before && same(before, {prompt: state.prompt, objects: state.objects})) before = undone.pop();
  if (before) {
    Object.assign(state, before);
    change();
  }
}

function select(id) {
  selected = id;
  list.select();
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
  state.objects = objectsOf(scene, facts.labels, () => nextId++);
  selected = null;
}

// Pictures

async function imageOf(png) {
  const image = new Image();
  image.src = pngUrl(png);
  await image.decode();
  return image;
}

function keep(picture) {
  picture.number = nextNumber++;
  pictures.push(picture);
  if (pictures.length > MAX_PICTURES) pictures.shift();
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
  const body = {scene: entryOf(state, named), seed: state.seed, num_images: state.num_images, precision: state.precision, options: state.options};
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
      keep(picture);
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
    keep(source);
    current = source;
    setMode("edit");
    forcedHole = found.edit.boxes;
  }
  if (!isOurs) state.objects = [];
  const picture = {prompt: state.prompt, size: state.size, objects: clone(state.objects), image, png: found.picture, found: [],
    options: isOurs ? clone(state.options) : null, precision: state.precision, seed: state.seed};
  keep(picture);
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

function thumb(picture) {
  const made = element("button", {title: picture.prompt || "no caption"},
    element("img", {src: picture.image.src, alt: picture.prompt}),
    element("span", {textContent: picture.options ? `seed ${picture.seed}${picture.source ? ", edited" : ""}` : "opened"}));
  made.addEventListener("click", () => recall(picture));
  return made;
}

function refresh() {
  const isFree = !job;
  if ($("prompt").value !== state.prompt) $("prompt").value = state.prompt;
  list.refresh();
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
  refreshStrip();
  $("save-png").disabled = !current;
  const command = current && current.command;
  $("again").hidden = !command;
  $("command").textContent = command || "";
  $("save-source").hidden = !(current && current.source);
  $("again-files").textContent = command ? filesFor(command) : "";
  canvas.paint();
}

function refreshStrip() {
  if (!same(shownPictures, pictures.map((each) => each.number))) {
    $("strip").replaceChildren(...pictures.map(thumb));
    shownPictures = pictures.map((each) => each.number);
  }
  pictures.forEach((picture, index) => { $("strip").children[index].ariaPressed = picture === current; });
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
    hole: job ? [] : holes().map((box) => cellsOf(box, facts.grid)),
    found: $("show-found").checked && current && !job ? current.found : [],
  };
}

// The start

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
    saveText(facts.files.layout, JSON.stringify(entryOf(state, state.objects.filter((each) => each.label || each.phrase)), null, 2) + "\n"));
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
  list = new ObjectList(facts, $("objects"), $("removed"), {objects: () => state.objects, selected: () => selected, mode: () => mode,
    base: () => mode === "edit" ? base : null, shown: () => current, removed: removedOnes, select, begin, change, remove: removeBox,
    putBack(object) { begin(); state.objects.push(clone(object)); change(); }});
  const values = new Values(state, facts);
  for (const [id, named] of [["main-fields", mainFields(facts)], ["more-fields", moreFields(facts, () => values.get("auto"))]]) {
    for (const each of named) {
      const field = fieldOf(each, () => values.get(each.name), (value) => {
        values.set(each.name, value);
        for (const other of fields) other.refresh();
      });
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
