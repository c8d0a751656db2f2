// What of a picture is drawn anew: the places of the objects that are others than in it, before and after.
// base: the picture that is edited, with the objects it was drawn with; null: none.

export const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

export const originIn = (base, object) => base && base.objects.find((each) => each.id === object.id);

export const removedFrom = (base, objects) =>
  base ? base.objects.filter((each) => !objects.some((other) => other.id === each.id)) : [];

export function changeOf(base, object) {
  const origin = originIn(base, object);
  if (!origin) return "new";
  if (!same(origin.bbox, object.bbox)) return "moved";
  if (origin.label !== object.label || origin.phrase !== object.phrase) return "changed";
  return object.edit ? "repainted" : "";
}

export function holesOf(base, objects) {
  if (!base) return [];
  const found = removedFrom(base, objects).map((each) => each.bbox);
  for (const object of objects) {
    const change = changeOf(base, object);
    if (change === "moved") found.push(originIn(base, object).bbox);
    if (change) found.push(object.bbox);
  }
  return found;
}

// All cells that a box touches. grid: [rows, columns].
export function cellsOf(box, [rows, columns]) {
  const slack = 1e-4, low = (share, count) => Math.floor(share * count + slack) / count;
  const high = (share, count) => Math.ceil(share * count - slack) / count;
  return [low(box[0], columns), low(box[1], rows), high(box[2], columns), high(box[3], rows)];
}
