// W2: draws a BlockTablePicture. Tokens are buttons; the chain below says where the chosen one lives.

function tokenButton(model, picture, [position, text, stored]) {
  const state = stored ? "" : ", not stored yet";
  const node = button(text, `token ${position}: ${text}${state}`, () => send(model, "token", position));
  return put(node, {
    class: `mv-token${stored ? "" : " mv-token-waiting"}`,
    "aria-pressed": String(position === picture.token),
    "data-token": position,
  });
}

function entryBox(model, picture, entry) {
  const head = element("div", { class: "mv-block-head" }, [
    "logical ", element("strong", {}, String(entry.logical)), " → physical ", element("strong", {}, String(entry.physical)),
    entry.physical === 0 ? " · left the window" : "",
    entry.ref_count > 1 ? ` · shared ×${entry.ref_count}` : "",
  ]);
  const unused = Array.from({ length: entry.num_unused }, () =>
    element("span", { class: "mv-slot-empty", title: "slot without a token yet", "aria-hidden": "true" }),
  );
  const tokens = entry.tokens.map((token) => tokenButton(model, picture, token));
  const chosen = entry.physical === picture.block ? " mv-block-chosen" : "";
  const attributes = {
    class: `mv-block${chosen}`, style: `border-top-color:${picture.colour}`, role: "group",
    "aria-label": `logical block ${entry.logical} is physical block ${entry.physical}`,
  };
  return element("div", attributes, [head, element("div", { class: "mv-tokens" }, [...tokens, ...unused])]);
}

function chainLinks(chain) {
  return chain.flatMap(([label, formula, value], i) => {
    const link = element("li", { class: "mv-link", "data-link": label }, [
      element("span", { class: "mv-link-label" }, label),
      element("span", { class: "mv-link-formula" }, formula),
      element("span", { class: "mv-link-value" }, value),
    ]);
    const arrow = element("li", { class: "mv-arrow", "aria-hidden": "true" }, "→");
    return i ? [arrow, link] : [link];
  });
}

function valueRows(values) {
  return values.map(([name, numbers]) =>
    element("tr", {}, [
      element("th", { scope: "row" }, `${name} =`),
      ...numbers.map((number) => element("td", {}, number)),
      element("td", {}, "…"),
    ]),
  );
}

// Left and right arrows walk along the tokens.
function walk(model, picture, event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !event.target.matches(".mv-token") || picture.token === null) return;
  const next = picture.token + step;
  if (!picture.entries.some((entry) => entry.tokens.some(([position]) => position === next))) return;
  event.preventDefault();
  send(model, "token", next);
}

function controls(model) {
  const range = (count) => Array.from({ length: count }, (_, i) => [String(i), String(i)]);
  const request = dropdown("request", (value) => send(model, "request", value));
  const group = dropdown("group", (value) => send(model, "group", Number(value)));
  const groupLabel = labelled("group", group);
  const layer = dropdown("layer", (value) => send(model, "layer", Number(value)));
  const head = dropdown("KV head", (value) => send(model, "kv_head", Number(value)));
  const words = dropdown("words", (value) => send(model, "words", value));
  const page = () => model.get("picture").page;
  const earlier = button("◀ earlier", "earlier tokens", () => send(model, "page", page() - 1));
  const later = button("later ▶", "later tokens", () => send(model, "page", page() + 1));
  const root = element("div", { class: "mv-row" }, [
    labelled("request", request), groupLabel, labelled("layer", layer), labelled("KV head", head),
    labelled("words", words), earlier, later,
  ]);
  return {
    root,
    draw(picture) {
      fillDropdown(request, picture.requests, picture.request);
      fillDropdown(group, picture.groups, picture.group);
      groupLabel.hidden = picture.groups.length < 2;
      fillDropdown(layer, range(picture.num_layers), picture.layer);
      fillDropdown(head, range(picture.num_kv_heads), picture.kv_head);
      fillDropdown(words, picture.choices_of_words, picture.words);
      earlier.hidden = later.hidden = picture.num_pages < 2;
      earlier.disabled = picture.page === 0;
      later.disabled = picture.page === picture.num_pages - 1;
    },
  };
}

function render({ model, el }) {
  const title = element("div", { class: "mv-title", "aria-live": "polite" });
  const top = controls(model);
  const blocks = element("div", { class: "mv-blocks" });
  const chain = element("ol", { class: "mv-chain", "aria-label": "from position to bytes" });
  const values = element("tbody");
  const table = element("table", { class: "mv-numbers" }, values);
  const notes = element("ul", { class: "mv-notes", "aria-label": "the analogy with paging" });
  const end = footer();
  const root = element("div", { class: "mv-view mv-view-block-table", role: "group" }, [
    title, top.root, blocks, chain, notes, table, end.root,
  ]);
  put(el, {}, root);
  blocks.addEventListener("keydown", (event) => walk(model, model.get("picture"), event));
  let key = "";
  return drawOnChange(model, (picture) => {
    title.textContent = picture.title;
    put(root, { "aria-label": picture.aria });
    top.draw(picture);
    const newKey = JSON.stringify([picture.entries, picture.token, picture.request]);
    if (newKey !== key) {
      const hadFocus = blocks.contains(document.activeElement);
      put(blocks, {}, picture.entries.map((entry) => entryBox(model, picture, entry)));
      if (hadFocus) blocks.querySelector(`[data-token="${picture.token}"]`)?.focus();
      key = newKey;
    }
    const inMemory = picture.address ? [["address in memory", "", picture.address]] : [];
    put(chain, {}, chainLinks([...picture.chain, ...inMemory]));
    put(notes, {}, picture.notes.map((note) => element("li", {}, note)));
    notes.hidden = picture.notes.length === 0;
    put(values, {}, valueRows(picture.values));
    table.hidden = picture.values.length === 0;
    end.draw(picture);
  });
}

export default { render };
