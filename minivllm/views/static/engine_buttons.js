function slider(model, picture) {
  const last = picture.values.length - 1;
  const start = picture.values.indexOf(picture.chosen);
  const node = element("input", { type: "range", class: "mv-slider", min: 0, max: last, value: start, "aria-label": picture.slider });
  const value = element("span", { class: "mv-value" }, String(picture.chosen));
  node.addEventListener("input", () => (value.textContent = String(picture.values[node.value])));
  node.addEventListener("change", () => send(model, picture.slider, picture.values[node.value]));
  return element("div", { class: "mv-row" }, [labelled(picture.slider, node), value]);
}

function render({ model, el }) {
  const first = model.get("picture");
  const field = element("input", { type: "text", class: "mv-number-input mv-field", value: first.field ?? "", "aria-label": "prompt" });
  const names = first.buttons.map((name) => button(name, name, () => send(model, name, field.value)));
  const row = element("div", { class: "mv-row" }, first.field === null ? names : [field, ...names]);
  const rows = first.slider === null ? [row] : [row, slider(model, first)];
  const said = element("div", { class: "mv-detail", role: "status", "aria-live": "polite" });
  const end = footer();
  put(el, {}, element("div", { class: "mv-view mv-view-engine-buttons" }, [...rows, said, end.root]));
  return drawOnChange(model, (picture) => {
    said.textContent = picture.said;
    end.draw(picture);
  });
}

export default { render };
