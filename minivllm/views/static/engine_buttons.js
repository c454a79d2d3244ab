function render({ model, el }) {
  const first = model.get("picture");
  const field = element("input", { type: "text", class: "mv-number-input mv-field", value: first.field ?? "", "aria-label": "prompt" });
  const names = first.buttons.map((name) => button(name, name, () => send(model, name, field.value)));
  const said = element("div", { class: "mv-detail", role: "status", "aria-live": "polite" });
  const row = element("div", { class: "mv-row" }, first.field === null ? names : [field, ...names]);
  const end = footer();
  put(el, {}, element("div", { class: "mv-view mv-view-engine-buttons" }, [row, said, end.root]));
  return drawOnChange(model, (picture) => {
    said.textContent = picture.said;
    end.draw(picture);
  });
}

export default { render };
