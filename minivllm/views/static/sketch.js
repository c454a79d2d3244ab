// W3 to W7: draws a SketchPicture, a list of marks with the controls above it. A mark ends with its kind.

const ROLES = { ink: "--mv-text", soft: "--mv-soft", line: "--mv-line", page: "--mv-page", pick: "--mv-pick" };
const colourOf = (name) => (name in ROLES ? `var(${ROLES[name]})` : name);
const patternId = (prefix, pattern, fill) => `${prefix}-${pattern}-${fill.replace("#", "")}`;

function patternNode(prefix, pattern, fill) {
  const size = { width: 5, height: 5, patternUnits: "userSpaceOnUse" };
  const style = `fill:${colourOf(fill)}`;
  const id = patternId(prefix, pattern, fill);
  if (pattern === "dots") return shape("pattern", { id, ...size }, [shape("circle", { cx: 2.5, cy: 2.5, r: 1.2, style })]);
  const turned = { id, ...size, patternTransform: "rotate(45)" };
  return shape("pattern", turned, [shape("rect", { width: 1.8, height: 5, style })]);
}

function boxNodes(prefix, [x, y, width, height, fill, pattern, border]) {
  const filled = { solid: colourOf(fill), hatch: 1, dots: 1 }[pattern];
  const paint = filled === 1 ? `url(#${patternId(prefix, pattern, fill)})` : filled || "transparent";
  const edge = border || (pattern === "solid" ? "" : fill);
  const thick = border === "ink" || border === "pick" ? 2 : 1;
  const style = `fill:${paint};stroke:${edge ? colourOf(edge) : "none"};stroke-width:${thick}`;
  const nodes = [shape("rect", { x, y, width: Math.max(width, 0), height: Math.max(height, 0), style })];
  if (pattern === "cross") {
    const d = `M${x},${y}l${width},${height}M${x + width},${y}l${-width},${height}`;
    nodes.push(shape("path", { d, style: `fill:none;stroke:${colourOf(fill)}` }));
  }
  return nodes;
}

function dotNode([x, y, form, fill, radius]) {
  const style = `fill:${colourOf(fill)};stroke:var(--mv-page);stroke-width:1`;
  if (form === "square") return shape("rect", { x: x - radius, y: y - radius, width: 2 * radius, height: 2 * radius, style });
  if (form === "diamond") return shape("path", { d: `M${x - radius},${y}l${radius},${-radius}l${radius},${radius}l${-radius},${radius}z`, style });
  return shape("circle", { cx: x, cy: y, r: radius, style });
}

function lineNode([x, y, toX, toY, ink, thickness, dashed]) {
  const style = `stroke:${colourOf(ink)};stroke-width:${thickness}`;
  return shape("line", { x1: x, y1: y, x2: toX, y2: toY, style, "stroke-dasharray": dashed ? "6 4" : null });
}

function trailNode([points, ink, thickness, dashed]) {
  const style = `fill:none;stroke:${colourOf(ink)};stroke-width:${thickness};stroke-linejoin:round`;
  return shape("polyline", { points: points.join(" "), style, "stroke-dasharray": dashed ? "5 3" : null });
}

function wordsNode([x, y, text, size, ink, anchor]) {
  return shape("text", { x, y: y + size * 0.92, style: `font-size:${size}px;fill:${colourOf(ink)};text-anchor:${anchor}` }, text);
}

// A group for each mark, its hover words and its click included.
function drawMark(model, prefix, group, mark) {
  const kind = mark[mark.length - 1];
  const nodes = kind === "box" ? boxNodes(prefix, mark) : [];
  if (kind === "line") nodes.push(lineNode(mark));
  if (kind === "words") nodes.push(wordsNode(mark));
  if (kind === "dot") nodes.push(dotNode(mark));
  if (kind === "trail") nodes.push(trailNode(mark));
  const hover = kind === "box" ? mark[7] : kind === "dot" ? mark[5] : "";
  if (hover) nodes.push(shape("title", {}, hover));
  const click = kind === "box" ? mark[8] : null;
  put(group, { "data-kind": kind, class: click ? "mv-cell" : null }, nodes);
  group.onclick = click ? () => send(model, click[0], click[1]) : null;
}

function canvas(model, prefix) {
  const defs = shape("defs");
  const marks = shape("g");
  const svg = shape("svg", { class: "mv-sketch", role: "img" }, [defs, marks]);
  const keys = [];
  return {
    svg,
    draw(picture) {
      const boxes = picture.marks.filter((mark) => mark[mark.length - 1] === "box").map((mark) => [mark[5], mark[4]]);
      const patterned = [...boxes, ...picture.legend.map(([fill, pattern]) => [pattern, fill])];
      const wanted = [...new Set(patterned.filter(([p]) => p === "hatch" || p === "dots").map(String))].sort();
      if (defs.dataset.key !== String(wanted)) {
        put(defs, { "data-key": wanted }, wanted.map((pair) => patternNode(prefix, ...pair.split(","))));
      }
      put(svg, { viewBox: `0 0 ${picture.width} ${picture.height}`, width: picture.width, height: picture.height, "aria-label": picture.aria });
      while (marks.children.length > picture.marks.length) marks.lastChild.remove();
      keys.length = Math.min(keys.length, picture.marks.length);
      picture.marks.forEach((mark, i) => {
        const key = JSON.stringify(mark);
        if (keys[i] === key) return;
        keys[i] = key;
        if (!marks.children[i]) marks.append(shape("g"));
        drawMark(model, prefix, marks.children[i], mark);
      });
    },
  };
}

function choiceControl(model, [name, label]) {
  const node = dropdown(label, (value) => send(model, name, value));
  return { root: labelled(label, node), draw: ([, , options, value]) => fillDropdown(node, options, value) };
}

function pressControl(model, [name, label, , value]) {
  const node = button(label, label, () => send(model, name, value));
  return { root: node, draw: ([, , isDown]) => put(node, { "aria-pressed": isDown ? "true" : "false", "data-control": name }) };
}

// What the reader asked for last wins over older pictures still on their way.
function sliderControl(model, [name, label]) {
  let values = [];
  let asked = null;
  const node = element("input", { type: "range", class: "mv-slider mv-short", min: 0, step: 1, "aria-label": label, "data-control": name });
  const shown = element("output", { class: "mv-value" });
  node.addEventListener("input", () => {
    asked = values[Number(node.value)];
    send(model, name, asked);
  });
  return {
    root: element("label", { class: "mv-label mv-control" }, [`${label} `, node, shown]),
    draw([, , newValues, value, words], failed) {
      values = newValues;
      if (asked === value || failed) asked = null;
      put(node, { max: values.length - 1, "aria-valuetext": words });
      if (asked === null) node.value = String(values.indexOf(value));
      shown.textContent = words;
    },
  };
}

function controlRow(model) {
  const root = element("div", { class: "mv-row mv-controls" });
  let key = "";
  let drawers = [];
  return {
    root,
    draw(picture) {
      const newKey = JSON.stringify(picture.controls.map((control) => control[0]));
      if (newKey !== key) {
        const makers = { slider: sliderControl, choice: choiceControl, press: pressControl };
        drawers = picture.controls.map((c) => makers[c[c.length - 1]](model, c));
        put(root, {}, drawers.map((drawer) => drawer.root));
        key = newKey;
      }
      root.hidden = drawers.length === 0;
      drawers.forEach((drawer, i) => drawer.draw(picture.controls[i], picture.status));
    },
  };
}

function legendKey(prefix, [fill, pattern, words]) {
  const svg = shape("svg", { width: 22, height: 15, class: "mv-swatch", "aria-hidden": "true" }, boxNodes(prefix, [1, 1, 20, 13, fill, pattern, ""]));
  return element("span", { class: "mv-key" }, [svg, words]);
}

function render({ model, el }) {
  const prefix = `mv-${Math.random().toString(36).slice(2)}`; // ids are the page's
  const title = element("div", { class: "mv-title", "aria-live": "polite" });
  const steps = stepper(model);
  const controls = controlRow(model);
  const drawing = canvas(model, prefix);
  const frame = element("div", { class: "mv-frame" }, drawing.svg);
  const legend = element("div", { class: "mv-legend" });
  const lines = element("ol", { class: "mv-decisions" });
  const from = element("div", { class: "mv-faint" });
  const end = footer();
  put(el, {}, element("div", { class: `mv-view mv-view-${model.get("picture").view}` }, [
    title, steps.root, controls.root, frame, legend, lines, end.root, from,
  ]));
  const stop = drawOnChange(model, (picture) => {
    title.textContent = picture.title;
    steps.draw(picture);
    controls.draw(picture);
    drawing.draw(picture);
    put(legend, {}, picture.legend.map((key) => legendKey(prefix, key)));
    put(lines, { "aria-label": picture.lines_name }, picture.lines.map((words) => element("li", {}, words)));
    end.draw(picture);
    from.textContent = picture.provenance;
  });
  return () => {
    stop();
    steps.stop();
  };
}

export default { render };
