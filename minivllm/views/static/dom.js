// Shared by all views. Text reaches the page through text nodes only; nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg"; // a name, never fetched

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) node.removeAttribute(name);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  if (children !== undefined) node.replaceChildren(...[].concat(children));
  return node;
}

// JupyterLab takes the arrow keys of whatever has the focus, unless that very element says no.
const FOCUSABLE = ["button", "input", "select", "summary"];
const KEYS = { "data-lm-suppress-shortcuts": "true" };

function element(tag, attributes = {}, children) {
  const keys = FOCUSABLE.includes(tag) || "tabindex" in attributes ? KEYS : {};
  return put(document.createElement(tag), { ...keys, ...attributes }, children);
}

const shape = (tag, attributes = {}, children) => put(document.createElementNS(SVG, tag), attributes, children);

function button(words, label, onClick) {
  const node = element("button", { type: "button", class: "mv-button", "aria-label": label, title: label }, words);
  node.addEventListener("click", onClick);
  return node;
}

function labelled(words, control) {
  return element("label", { class: "mv-label" }, [words + " ", control]);
}

function dropdown(label, onChange) {
  const node = element("select", { class: "mv-select", "aria-label": label });
  node.addEventListener("change", () => onChange(node.value));
  return node;
}

// Show these options and this choice; leave the list alone while nothing changed, so that it stays open.
function fillDropdown(node, options, chosen) {
  const key = JSON.stringify(options);
  if (node.dataset.key !== key) {
    node.replaceChildren(...options.map(([value, words]) => element("option", { value }, words)));
    node.dataset.key = key;
  }
  if (node.value !== String(chosen)) node.value = String(chosen);
}

const send = (model, control, value) => model.send({ control, value });

// Draw on the next frame, however many changes came; returns what ends it.
function drawOnChange(model, draw) {
  let frame = 0;
  const run = () => {
    frame = 0;
    draw(model.get("picture"));
  };
  const later = () => {
    if (!frame) frame = requestAnimationFrame(run);
  };
  model.on("change:picture", later);
  run();
  return () => {
    model.off("change:picture", later);
    cancelAnimationFrame(frame);
  };
}

// Previous, slider, next, play. What the reader asked for last wins over older pictures still on their way.
function stepper(model) {
  let shown = [0, 0]; // first and last step
  let asked = null;
  let timer = 0;
  let tickMs = 400;
  const ask = (step) => {
    asked = Math.max(shown[0], Math.min(shown[1], step));
    slider.value = String(asked);
    send(model, "step", asked);
  };
  const current = () => (asked === null ? Number(slider.value) : asked);
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    put(play, { "aria-label": "play", title: "play" }, "▶ play");
  };
  const tick = () => {
    if (current() >= shown[1]) stop();
    else if (asked === null) ask(current() + 1);
  };
  const byHand = (step) => {
    stop(); // else the next tick would play on
    ask(step);
  };
  const slider = element("input", { type: "range", class: "mv-slider", "aria-label": "step of the recorded run" });
  slider.addEventListener("input", () => byHand(Number(slider.value)));
  const play = button("▶ play", "play", () => {
    if (timer) return stop();
    if (current() >= shown[1]) ask(shown[0]);
    timer = setInterval(tick, tickMs);
    put(play, { "aria-label": "pause", title: "pause" }, "⏸ pause");
  });
  const value = element("output", { class: "mv-value" });
  const previous = button("◀", "previous step", () => byHand(current() - 1));
  const next = button("▶", "next step", () => byHand(current() + 1));
  const root = element("div", { class: "mv-row mv-steps", role: "group", "aria-label": "replay" }, [previous, slider, next, play, value]);
  return {
    root,
    stop,
    draw(picture) {
      root.hidden = picture.steps === null;
      if (root.hidden) return;
      const [first, last, at] = picture.steps;
      shown = [first, last];
      if (asked === at || picture.status) asked = null;
      put(slider, { min: first, max: last, step: 1 });
      if (asked === null) slider.value = String(at);
      tickMs = picture.tick_ms || 400;
      value.textContent = `${picture.step_word || "step"} ${at} of ${last}`;
    },
  };
}

// What every view ends with: a line for errors, and the text twin for whoever would rather read.
function footer() {
  const status = element("div", { class: "mv-status", role: "status", "aria-live": "polite" });
  const text = element("pre", { class: "mv-text" });
  const root = element("div", {}, [status, element("details", {}, [element("summary", {}, "as text"), text])]);
  return {
    root,
    draw(picture) {
      status.textContent = picture.status;
      text.textContent = picture.text;
    },
  };
}

const contrastInk = (colour) => {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return 0.299 * r + 0.587 * g + 0.114 * b > 120 ? "#000" : "#fff";
};
