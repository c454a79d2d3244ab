// The form under the question: what can be done with this card. Enter in the field answers.
function form(model, picture) {
  const press = (name) => button(name, name, () => send(model, name, null));
  if (picture.kind === "ended") return [press("another round")];
  if (picture.kind === "ticking") {
    const boxes = picture.points.map((point) => [element("input", { type: "checkbox" }), point]);
    const ticked = () => boxes.flatMap(([box], i) => (box.checked ? [i + 1] : []));
    const lines = boxes.map(([box, point]) => element("label", { class: "mv-row" }, [box, point]));
    const done = button("these I named", "these I named", () => send(model, "ticks", ticked()));
    return [element("fieldset", { style: "flex: 1 1 100%" }, [element("legend", {}, "Which did you name?"), ...lines]), done, press("skip")];
  }
  const label = picture.kind === "number" ? "your number, with its unit" : "your answer, or say it aloud";
  const field = element("input", { type: "text", class: "mv-number-input mv-field", "aria-label": label, placeholder: label });
  const reply = () => (picture.kind === "number" ? send(model, "answer", field.value) : send(model, "show points", null));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") reply();
  });
  const first = picture.kind === "number" ? button("answer", "answer", reply) : press("show points");
  const more = picture.kind === "number" ? [press("give up"), press("other numbers")] : [];
  return [field, first, ...more, press("skip"), press("end")];
}

function render({ model, el }) {
  const head = element("div", { class: "mv-title" });
  const ask = element("div", { class: "mv-detail" });
  const controls = element("div", { class: "mv-row" });
  const said = element("pre", { class: "mv-text", role: "status", "aria-live": "polite", style: "white-space: pre-wrap" });
  const left = element("div", { class: "mv-faint" });
  const end = footer();
  const root = element("div", { class: "mv-view mv-view-flash-cards", role: "group" }, [head, ask, controls, said, left, end.root]);
  put(el, {}, root);
  let key = null;
  return drawOnChange(model, (picture) => {
    put(root, { "aria-label": picture.title });
    head.textContent = picture.title;
    ask.textContent = picture.ask;
    said.textContent = picture.said;
    left.textContent = picture.left;
    end.draw(picture);
    if (picture.key === key) return; // the same question: keep what is being typed
    const hadFocus = key !== null && root.contains(document.activeElement);
    key = picture.key;
    controls.replaceChildren(...form(model, picture));
    const first = controls.querySelector("input, button");
    if (hadFocus && first) first.focus();
  });
}

export default { render };
