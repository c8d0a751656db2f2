// Entries of layout files, and the objects of the page that are made of them and written as them.
// An object: {id, hue, label, phrase, scale, bbox, edit}. hue: its colour's number. edit: drawn anew where it stands.
// label "": what the phrase says, or in edit mode, without one, the background.

export function objectsOf(scene, labels, newId) {
  return scene.objects.map(({label, phrase = "", scale = 1, bbox, edit = false}, hue) => {
    const isClass = labels.includes(label);
    return {id: newId(), hue, label: isClass ? label : "", phrase: phrase || (isClass ? "" : label), scale, bbox, edit};
  });
}

export function entryOf({prompt, size}, objects) {
  const entry = {prompt, objects: []};
  for (const {label, phrase, scale, bbox} of objects) {
    const item = {label: label || phrase, bbox};
    if (phrase && label) item.phrase = phrase;
    if (scale !== 1) item.scale = scale;
    entry.objects.push(item);
  }
  if (size) [entry.height, entry.width] = size;
  return entry;
}
