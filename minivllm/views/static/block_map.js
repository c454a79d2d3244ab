// W1: draws a BlockMapPicture. One <g> for each block, redrawn only when what it shows changed.

const HEADER = 13; // px of a cell that carries text

function patterns(prefix, colours) {
  const hatch = (id, ink) =>
    shape("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, [
      shape("rect", { width: 1.8, height: 5, style: `fill:${ink}` }),
    ]);
  const dots = shape("pattern", { id: `${prefix}-dots`, width: 5, height: 5, patternUnits: "userSpaceOnUse" }, [
    shape("circle", { cx: 2.5, cy: 2.5, r: 1.1, class: "mv-ink" }),
  ]);
  return [dots, ...colours.map((colour) => hatch(`${prefix}-${colour.slice(1)}`, colour))];
}

function slots(prefix, kind, share, colours, blockSize, x, y, width, height) {
  const box = (attributes) => shape("rect", { x, y, width, height, ...attributes });
  if (kind === "empty") return [box({ class: "mv-empty" })];
  if (kind === "cached") return [box({ fill: `url(#${prefix}-dots)` }), box({ class: "mv-cached" })];
  if (kind === "on_host") {
    return [box({ fill: `url(#${prefix}-dots)` }), box({ style: `fill:none;stroke:${colours[0]};stroke-width:2` })];
  }
  if (kind === "reserved") {
    return [box({ class: "mv-reserved", x: x + 1, y: y + 1, width: width - 2, height: height - 2, style: `stroke:${colours[0]}` })];
  }
  if (kind === "null") {
    const cross = `M${x},${y}l${width},${height}M${x + width},${y}l${-width},${height}`;
    return [box({ class: "mv-empty" }), shape("path", { d: cross, class: "mv-cross" })];
  }
  const band = height / colours.length;
  const nodes = [box({ fill: `url(#${prefix}-${colours[0].slice(1)})` })];
  colours.forEach((fill, i) => {
    nodes.push(shape("rect", { x, y: y + i * band, width: width * share, height: band, fill }));
  });
  if (width / blockSize >= 3) {
    const lines = Array.from({ length: blockSize - 1 }, (_, i) => `M${x + ((i + 1) * width) / blockSize},${y}v${height}`);
    nodes.push(shape("path", { d: lines.join(""), class: "mv-slot-lines" }));
  }
  return nodes;
}

function cellNodes(prefix, picture, index, left, top, width, height) {
  const [kind, filled, cached, owners] = picture.cells[index];
  const who = owners.map((i) => picture.owners[i]);
  const header = picture.has_text ? HEADER : 0;
  const nodes = slots(
    prefix, kind, filled / picture.block_size, who.map((o) => o.colour), picture.block_size,
    left, top + header, width, height - header,
  );
  if (header) {
    nodes.push(shape("text", { x: left + (who.length > 1 ? 5 : 3), y: top + 11, class: "mv-number" }, String(index)));
    const letters = who.map((o) => o.letter).join("+");
    const both = who.length > 1 ? `${letters} ×${who.length}` : letters;
    const words = who.length > 1 && both.length * 6.5 > width - 32 ? `×${who.length}` : both;
    const x = left + width - (cached && who.length ? 12 : 4);
    nodes.push(shape("text", { x, y: top + 11, class: "mv-letter" }, words));
  }
  if (kind === "live") {
    const border = who.length > 1 ? "mv-shared" : "mv-owned";
    const inset = who.length > 1 ? Math.min(1.5, width / 8) : 0.5;
    nodes.push(shape("rect", {
      x: left + inset, y: top + inset, width: width - 2 * inset, height: height - 2 * inset, class: border,
    }));
    const corner = Math.min(who.length > 1 ? 11 : 8, width / 2);
    if (cached) nodes.push(shape("path", { d: `M${left + width},${top}v${corner}l${-corner},${-corner}z`, class: "mv-ink" }));
  }
  if (index === picture.selected) {
    nodes.push(shape("rect", { x: left - 1, y: top - 1, width: width + 2, height: height + 2, class: "mv-selected" }));
    if (picture.selected_offset !== null) {
      const slot = width / picture.block_size;
      nodes.push(shape("rect", {
        x: left + picture.selected_offset * slot, y: top + header, width: Math.max(slot, 2),
        height: height - header, class: "mv-selected-slot",
      }));
    }
  }
  nodes.push(shape("title", {}, hoverWords(picture, index, kind, filled, who)));
  return nodes;
}

function hoverWords(picture, index, kind, filled, who) {
  const names = { null: "null block", empty: "free and empty", cached: "free, contents still cached" };
  if (kind === "reserved") return `block ${index}: reserved for ${who.map((o) => o.letter).join(" and ")}`;
  const held = `${who.map((o) => o.letter).join(" and ")}, ${filled} of ${picture.block_size} slots filled`;
  return `block ${index}: ${kind === "live" ? held : names[kind]}`;
}

function swatch(prefix, kind) {
  const [w, h] = [20, 13];
  const svg = shape("svg", { width: w + 2, height: h + 2, class: "mv-swatch", "aria-hidden": "true" });
  const as = ["empty", "cached", "null", "reserved", "on_host"].includes(kind) ? kind : "live";
  const nodes = slots(prefix, as, kind === "unfilled" ? 0 : 1, ["#888888"], 1, 1, 1, w, h);
  if (kind === "shared") nodes.push(shape("rect", { x: 2.5, y: 2.5, width: w - 3, height: h - 3, class: "mv-shared" }));
  if (kind === "published") nodes.push(shape("path", { d: `M${w + 1},1v8l-8,-8z`, class: "mv-ink" }));
  return put(svg, {}, nodes);
}

// Host blocks 1, 2 ... below the pool; nothing there without preemption by swap.
function hostNodes(prefix, picture, top) {
  if (!picture.host.length) return [];
  const header = picture.has_text ? HEADER : 0;
  const gap = picture.cell_width >= 16 ? 3 : 1;
  const [width, height] = [picture.cell_width - gap, picture.cell_height - gap];
  const cells = picture.host.map(([kind, , , owners], i) => {
    const who = owners.map((index) => picture.owners[index]);
    const left = 2 + (i % picture.columns) * picture.cell_width;
    const y = top + 20 + Math.floor(i / picture.columns) * picture.cell_height;
    const nodes = slots(prefix, kind, 1, who.map((o) => o.colour), picture.block_size, left, y + header, width, height - header);
    if (header) {
      nodes.push(shape("text", { x: left + 3, y: y + 11, class: "mv-number" }, String(i + 1)));
      nodes.push(shape("text", { x: left + width - 4, y: y + 11, class: "mv-letter" }, who.map((o) => o.letter).join("")));
    }
    const held = who.length ? `swapped out by ${who[0].letter}` : "free";
    return shape("g", { "data-host": i + 1, "data-kind": kind }, [...nodes, shape("title", {}, `host block ${i + 1}: ${held}`)]);
  });
  return [shape("text", { x: 2, y: top + 14, class: "mv-number" }, "host memory"), ...cells];
}

function grid(model, prefix) {
  const defs = shape("defs");
  const cells = shape("g");
  const host = shape("g");
  const svg = shape("svg", { class: "mv-block-map", role: "img" }, [defs, cells, host]);
  const keys = [];
  cells.addEventListener("click", (event) => {
    const index = [...cells.children].indexOf(event.target.closest("g[data-block]"));
    if (index >= 0) send(model, "block", index);
  });
  function drawCell(picture, index) {
    const chosen = index === picture.selected ? picture.selected_offset : "";
    const [, , , owners] = picture.cells[index];
    const who = owners.map((i) => picture.owners[i]);
    const dimmed = picture.highlight !== null && !who.some((o) => o.id === picture.highlight);
    const cell = picture.cells[index].slice(0, 3);
    const key = JSON.stringify([cell, who.map((o) => o.id), index === picture.selected, chosen, dimmed]);
    if (keys[index] === key) return;
    keys[index] = key;
    const [width, height, gap] = [picture.cell_width, picture.cell_height, picture.cell_width >= 16 ? 3 : 1];
    const left = 2 + (index % picture.columns) * width;
    const top = 2 + Math.floor(index / picture.columns) * height;
    const nodes = cellNodes(prefix, picture, index, left, top, width - gap, height - gap);
    put(cells.children[index], { class: `mv-cell${dimmed ? " mv-dimmed" : ""}`, "data-kind": picture.cells[index][0] }, nodes);
  }
  return {
    svg,
    draw(picture) {
      const colours = [...new Set(picture.owners.map((o) => o.colour)), "#888888"];
      if (defs.dataset.key !== String(colours)) put(defs, { "data-key": colours }, patterns(prefix, colours));
      const { columns, cell_width, cell_height, block_size } = picture;
      const layout = JSON.stringify([picture.cells.length, columns, cell_width, cell_height, block_size]);
      if (cells.dataset.layout !== layout) {
        put(cells, { "data-layout": layout }, []); // another pool: every cell moves
        keys.length = 0;
      }
      while (cells.children.length < picture.cells.length) {
        cells.append(shape("g", { "data-block": cells.children.length }));
      }
      const rows = Math.ceil(picture.cells.length / picture.columns);
      const top = rows * picture.cell_height + 4;
      const hostRows = Math.ceil(picture.host.length / picture.columns);
      const height = top + (hostRows ? hostRows * picture.cell_height + 22 : 0);
      const width = picture.columns * picture.cell_width + 4;
      const hostKey = JSON.stringify([picture.host, picture.owners.map((o) => o.id), top]);
      if (host.dataset.key !== hostKey) put(host, { "data-key": hostKey }, hostNodes(prefix, picture, top));
      put(svg, { viewBox: `0 0 ${width} ${height}`, width, height, "aria-label": picture.aria });
      picture.cells.forEach((_, index) => drawCell(picture, index));
    },
  };
}

function moveWithKeys(model, picture, event) {
  const jumps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: picture.columns, ArrowUp: -picture.columns };
  if (event.key === "Escape") send(model, "block", null);
  if (!(event.key in jumps)) return;
  event.preventDefault();
  const from = picture.selected === null ? -1 : picture.selected;
  send(model, "block", Math.max(0, Math.min(picture.cells.length - 1, from + jumps[event.key])));
}

function ownerButtons(model, picture) {
  const shown = picture.owners.slice(0, 24).map((owner) => {
    const chosen = picture.highlight === owner.id;
    const chip = element("span", { class: "mv-chip", style: `background:${owner.colour};color:${contrastInk(owner.colour)}` }, owner.letter);
    const node = button([chip, owner.words], `show only the blocks of ${owner.words}`, () =>
      send(model, "highlight", chosen ? null : owner.id),
    );
    return put(node, { class: "mv-button mv-owner", "aria-pressed": String(chosen), "data-owner": owner.id });
  });
  const more = picture.owners.length - shown.length;
  return more > 0 ? [...shown, element("span", {}, `and ${more} more`)] : shown;
}

function render({ model, el }) {
  // Ids are the page's, and each widget loads this file anew: a counter would give every map the same ones.
  const prefix = `mv-${Math.random().toString(36).slice(2)}`;
  const title = element("div", { class: "mv-title" });
  const map = grid(model, prefix);
  const steps = stepper(model);
  const frame = element("div", {
    class: "mv-frame", tabindex: 0, role: "group", "aria-label": "blocks of the pool: arrow keys choose one, Escape none",
  }, map.svg);
  frame.addEventListener("keydown", (event) => moveWithKeys(model, model.get("picture"), event));
  const detail = element("div", { class: "mv-detail", "aria-live": "polite" });
  const owners = element("div", { class: "mv-row" });
  const legend = element("div", { class: "mv-legend" });
  const decisions = element("ol", { class: "mv-decisions", "aria-label": "last decisions" });
  const from = element("div", { class: "mv-faint" });
  const end = footer();
  put(el, {}, element("div", { class: "mv-view mv-view-block-map" }, [
    title, steps.root, frame, detail, owners, legend, decisions, end.root, from,
  ]));
  let ownersKey = "";
  const stop = drawOnChange(model, (picture) => {
    title.textContent = picture.title;
    steps.draw(picture);
    map.draw(picture);
    detail.textContent = picture.detail || "Choose a block: click it, or use the arrow keys.";
    const key = JSON.stringify([picture.owners, picture.highlight]);
    if (key !== ownersKey) redrawButtons(owners, ownerButtons(model, picture));
    ownersKey = key;
    put(legend, {}, picture.legend.map(([kind, words]) => element("span", { class: "mv-key" }, [swatch(prefix, kind), words])));
    put(decisions, {}, picture.decisions.map((words) => element("li", {}, words)));
    end.draw(picture);
    from.textContent = picture.provenance;
  });
  return () => {
    stop();
    steps.stop();
  };
}

// New buttons for old ones, without taking the focus from a keyboard user.
function redrawButtons(root, nodes) {
  const focused = [...root.children].indexOf(document.activeElement);
  root.replaceChildren(...nodes);
  if (focused >= 0 && nodes[focused]) nodes[focused].focus();
}

export default { render };
