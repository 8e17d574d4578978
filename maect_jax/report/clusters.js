"use strict";
// The page of clusters: shows what is in clusters/data.js, and keeps the names that people give.
// An image is called by its place among the thumbnails, a cluster by its place in data.numbers.
{
  const find = (selector) => document.querySelector(selector);
  const data = window.maectClusters;
  if (!data) {
    find("#view").textContent = "clusters/data.js is missing: keep the folder clusters beside this page.";
    throw new Error("no data");
  }

  const unpack = ({ type, base64 }) =>
    new globalThis[type](Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer);
  const [record, place, rank, distance, margin, beyond, shape] =
    ["record", "place", "rank", "distance", "margin", "beyond", "shape"].map((key) => unpack(data[key]));
  const neighbours = data.near && unpack(data.near.neighbours);
  const outliers = new Set(data.near?.outliers);
  const fromCentre = Array.from(rank.keys()).sort((a, b) => rank[a] - rank[b] || distance[a] - distance[b]);
  const count = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;

  function make(tag, { aria, ...others } = {}, ...children) {
    const element = Object.assign(document.createElement(tag), others);
    for (const [key, value] of Object.entries(aria ?? {})) element.setAttribute(`aria-${key}`, value);
    element.append(...children);
    return element;
  }

  // ---- Names: kept in the browser, by the digest of the clustering

  const KEPT = `maect clusters ${data.digest}`;
  const names = new Map(); // by the number of a cluster
  const moved = new Map(); // by the name of an image: the name of the cluster that it belongs to
  const undone = []; // what was before each change

  const content = () => ({
    clustering: data.digest,
    names: Object.fromEntries([...names].sort(([a], [b]) => a - b)),
    images: Object.fromEntries([...moved].sort()),
  });

  const isAsSaved = () => {
    const { names: given = {}, images = {} } = data.saved;
    return JSON.stringify(content()) === JSON.stringify({ clustering: data.digest, names: given, images });
  };

  function setContent({ names: given = {}, images = {} }) {
    names.clear();
    moved.clear();
    for (const [number, name] of Object.entries(given)) if (name) names.set(Number(number), name);
    for (const [image, name] of Object.entries(images)) if (name) moved.set(image, name);
  }

  // What is wrong with the content of a names.json; empty if nothing is.
  function problem(given) {
    const ofText = (x) => x && typeof x === "object" && Object.values(x).every((y) => typeof y === "string");
    if (!given || typeof given !== "object" || !given.clustering) return "is no names.json of such a page";
    if (given.clustering !== data.digest) return "has names of other clusters";
    if (!ofText(given.names ?? {}) || !ofText(given.images ?? {})) return "has something else than names";
    const unknown = Object.keys(given.names ?? {}).find((number) => !data.numbers.includes(Number(number)));
    return unknown === undefined ? "" : `names cluster ${unknown}, which there is not`;
  }

  function keep() {
    try {
      localStorage.setItem(KEPT, JSON.stringify({ ...content(), from: data.saved }));
      return "";
    } catch {
      return " This browser keeps nothing: save names.json before you close the page.";
    }
  }

  function restore() {
    let kept = null;
    try {
      kept = JSON.parse(localStorage.getItem(KEPT));
    } catch { /* it keeps nothing, or something else */ }
    const isKept = kept && !problem(kept);
    setContent(isKept ? kept : data.saved);
    const isNewer = isKept && JSON.stringify(kept.from) !== JSON.stringify(data.saved);
    if (isNewer && !isAsSaved()) say("The run's names.json has changed since. These are the names of this browser.");
  }

  function edit(message, change) {
    undone.push(JSON.stringify(content()));
    change();
    say(message + keep(), true);
    refresh();
  }

  function undo() {
    if (!undone.length) return;
    setContent(JSON.parse(undone.pop()));
    say(`Undone.${keep()}`);
    refresh();
  }

  function setName(group, name) {
    for (const cluster of group.clusters) {
      name ? names.set(data.numbers[cluster], name) : names.delete(data.numbers[cluster]);
    }
    for (const [image, of] of moved) {
      if (of === group.name) name ? moved.set(image, name) : moved.delete(image);
    }
  }

  function rename(group, name) {
    name = name.trim();
    if (name === (group.name ?? "")) return;
    const other = name && groups.get(`name ${name}`);
    const old = group.name ? `“${group.name}”` : group.title;
    const given = other ? `“${name}” and ${old} are merged.` : `“${name}” is the name of ${old} now.`;
    edit(name ? given : `The name ${old} is removed.`, () => setName(group, name));
  }

  function merge(group, other) {
    const name = other.name ?? group.name ?? other.own;
    edit(`Merged as “${name}”: ${group.title} and ${other.title}.`, () => {
      setName(group, name);
      setName(other, name);
    });
  }

  // Moves images to a group, or to those of a new name, which no cluster has.
  function move(images, { group, name = group.name ?? group.own }) {
    edit(`${count(images.length, "image")} moved to “${name}”.`, () => {
      if (group) setName(group, name);
      for (const image of images) {
        const isAtHome = names.get(data.numbers[place[image]]) === name;
        isAtHome ? moved.delete(data.names[image]) : moved.set(data.names[image], name);
      }
    });
  }

  // ---- Groups: the clusters of a name, with what was moved there; or those that are joined at a level

  let level = data.numbers.length; // groups that clusters without a name are read at
  let groups = new Map();
  let groupOf = []; // of each image
  let groupOfCluster = [];

  // For each cluster the first of those that it is joined with.
  function joined() {
    const of = data.numbers.map((_, cluster) => cluster);
    const nodes = of.map((cluster) => [cluster]);
    for (const [a, b] of data.merges.slice(0, data.numbers.length - level)) {
      const both = [...nodes[a], ...nodes[b]];
      const first = Math.min(...both);
      for (const cluster of both) of[cluster] = first;
      nodes.push(both);
    }
    return of;
  }

  function regroup() {
    const groupAt = (key, name) => {
      if (!groups.has(key)) groups.set(key, { name, clusters: [], images: [], size: 0, guests: 0 });
      return groups.get(key);
    };
    groups = new Map();
    const first = joined();
    groupOfCluster = data.numbers.map((number, cluster) => {
      const name = names.get(number);
      const group = groupAt(name === undefined ? `cluster ${first[cluster]}` : `name ${name}`, name);
      group.clusters.push(cluster);
      group.size += data.sizes[cluster];
      return group;
    });
    groupOf = Array.from(place, (cluster) => groupOfCluster[cluster]);
    const guests = [];
    for (const image of fromCentre) {
      const name = moved.size ? moved.get(data.names[image]) : undefined;
      if (name === undefined) groupOf[image].images.push(image);
      else guests.push([image, name]);
    }
    for (const [image, name] of guests) {
      groupOf[image].size -= 1;
      groupOf[image] = groupAt(`name ${name}`, name);
      groupOf[image].images.push(image);
      groupOf[image].size += 1;
      groupOf[image].guests += 1;
    }
    for (const group of groups.values()) {
      const numbers = group.clusters.map((cluster) => data.numbers[cluster]).sort((a, b) => a - b);
      const more = numbers.length > 3 ? ` and ${numbers.length - 2} more` : "";
      const listed = more ? numbers.slice(0, 2).join(", ") + more : numbers.join(", ");
      group.own = `cluster ${numbers[0]}`;
      group.title = group.name ?? (numbers.length > 1 ? `clusters ${listed}` : group.own);
      group.hash = numbers.length ? `#/cluster/${numbers[0]}` : `#/name/${encodeURIComponent(group.name)}`;
    }
    groups = new Map([...groups].sort(([, a], [, b]) => b.size - a.size));
  }

  // Other groups whose centres are near this one's, the nearest first.
  function nearest(group) {
    const near = group.clusters.flatMap((cluster) => data.nearest[cluster].map((other, i) => [i, other]));
    const sorted = near.sort(([a], [b]) => a - b).map(([, cluster]) => groupOfCluster[cluster]);
    return [...new Set(sorted)].filter((other) => other !== group);
  }

  const nearestFirst = (group) => [...new Set([...nearest(group), ...groups.values()])];

  // ---- Pictures

  const { border, cell, columns: across, ending, side } = data.sheets;
  const PAD = 600; // pixels beyond the window for which items are there already

  // Shows the thumbnail of an image in a square.
  function paint(square, image, size) {
    const picture = square.firstChild;
    const [sheet, at] = [Math.floor(image / across ** 2), image % across ** 2];
    const scale = size / side;
    const offset = (i) => `${-(i * cell + border) * scale}px`;
    square.style.width = square.style.height = `${size}px`;
    picture.style.width = `${shape[2 * image] * scale}px`;
    picture.style.height = `${shape[2 * image + 1] * scale}px`;
    picture.style.backgroundImage = `url(clusters/sprites_${String(sheet).padStart(3, "0")}.${ending})`;
    picture.style.backgroundSize = `${across * cell * scale}px auto`;
    picture.style.backgroundPosition = `${offset(at % across)} ${offset(Math.floor(at / across))}`;
    return square;
  }

  const square = () => make("span", { className: "square" }, make("span", { className: "picture" }));

  // A long list: only the items near the window are in the document, in their order.
  // `create` makes an element, `fill` shows an item in it; all are of one size. `drawn` is called
  // when others are shown.
  let lists = [];
  function scroller(root, { gap, columns, height, create, fill, drawn = () => {} }) {
    const shown = new Map(); // by index
    const spare = [];
    let items = [];
    let [width, wide, high, perRow] = [0, 0, 0, 1];

    function show(index, element) {
      const [row, column] = [Math.floor(index / perRow), index % perRow];
      element.style.transform = `translate(${column * (wide + gap)}px, ${row * (high + gap)}px)`;
      element.style.width = `${wide}px`;
      element.style.height = `${high}px`;
      fill(element, items[index], index, wide);
    }

    function draw() {
      const { top } = root.getBoundingClientRect();
      const step = high + gap;
      const first = Math.max(0, Math.floor((-top - PAD) / step)) * perRow;
      const last = Math.min(items.length, Math.max(0, Math.ceil((innerHeight - top + PAD) / step)) * perRow);
      for (const [index, element] of shown) {
        const isKept = index >= first && index < last;
        // The one with the focus stays, or the focus would be lost.
        if (isKept || (index < items.length && element.contains(document.activeElement))) continue;
        shown.delete(index);
        element.remove();
        spare.push(element);
      }
      for (let index = last - 1; index >= first; index -= 1) {
        if (shown.has(index)) continue;
        const element = spare.pop() ?? create();
        show(index, element);
        shown.set(index, element);
        root.insertBefore(element, shown.get(index + 1) ?? null);
      }
      drawn(shown);
    }

    function set(given) {
      items = given;
      width = root.clientWidth;
      perRow = Math.max(1, columns(width));
      wide = Math.floor((width - gap * (perRow - 1)) / perRow);
      high = height(wide);
      root.style.height = `${Math.max(0, Math.ceil(items.length / perRow) * (high + gap) - gap)}px`;
      draw();
      for (const [index, element] of shown) show(index, element);
    }

    const list = {
      set,
      draw,
      shown,
      item: (index) => items[index],
      length: () => items.length,
      perRow: () => perRow,
      perPage: () => Math.max(1, Math.floor(innerHeight / (high + gap)) - 1) * perRow,
      // Scrolls until an item can be seen; returns its element.
      reveal(index) {
        const { top } = root.getBoundingClientRect();
        const y = top + Math.floor(index / perRow) * (high + gap);
        const above = find(".tabs").offsetHeight + gap;
        const below = innerHeight - high - find(".foot").offsetHeight - gap;
        if (y < above || y > below) scrollBy(0, y < above ? y - above : y - below);
        draw();
        return shown.get(index);
      },
    };
    lists.push(list);
    new ResizeObserver(() => {
      if (root.isConnected && root.clientWidth !== width) set(items);
    }).observe(root);
    return list;
  }

  let isDrawing = false;
  addEventListener("scroll", () => {
    if (isDrawing) return;
    isDrawing = true;
    requestAnimationFrame(() => {
      isDrawing = false;
      for (const list of lists) list.draw();
    });
  }, { passive: true });

  // ---- Images that can be chosen

  const chosen = new Set();
  let onChosen = () => {};

  function choose(images, isChosen) {
    for (const image of images) isChosen ? chosen.add(image) : chosen.delete(image);
    const some = chosen.size > 0;
    find("#chosen").hidden = !some;
    find("#chosen .count").textContent = count(chosen.size, "image");
    find("#closer").hidden = chosen.size !== 1;
    find("#closer").href = `#/image/${[...chosen][0]}`;
    onChosen();
  }

  const fileName = (image) => data.names[image].split("/").pop();

  // A grid of images, with captions if `caption` gives them; `isPaired` has two at a time together.
  function grid(label, { caption, isPaired = false } = {}) {
    const root = make("div", {
      className: "list", role: "listbox", aria: { label, multiselectable: true, orientation: "horizontal" },
    });
    let [current, anchor] = [0, 0];
    const gap = 8;
    const list = scroller(root, {
      gap,
      columns(width) {
        const fit = Math.max(3, Math.floor((width + gap) / (104 + gap)));
        return isPaired ? 2 * Math.floor(fit / 2) : fit;
      },
      height: (wide) => wide + (caption ? 24 : 0),
      create() {
        const tile = make("div", { className: "tile", tabIndex: -1 }, square());
        tile.setAttribute("role", "option");
        if (caption) tile.append(make("span", { className: "caption", aria: { hidden: true } }));
        return tile;
      },
      fill(tile, image, index, wide) {
        const isMoved = moved.has(data.names[image]);
        const more = caption?.(image, index).replace(fileName(image), "").trim();
        const said = [data.names[image], groupOf[image].title, isMoved ? "moved" : "", more];
        const label = [...new Set(said.filter(Boolean))].join(", ");
        tile.dataset.index = index;
        tile.title = data.names[image];
        tile.tabIndex = index === current ? 0 : -1;
        tile.classList.toggle("moved", isMoved);
        const about = { label, selected: chosen.has(image), setsize: list.length(), posinset: index + 1 };
        for (const [key, value] of Object.entries(about)) tile.setAttribute(`aria-${key}`, value);
        paint(tile.firstChild, image, wide);
        if (isPaired) tile.style.translate = `${(index % 2 ? -1 : 1) * (gap / 2 - 1)}px`;
        if (caption) tile.lastChild.textContent = caption(image, index);
      },
      // A Tab must lead into the grid, wherever it is scrolled to.
      drawn(shown) {
        if (shown.has(current) || !shown.size) return;
        current = Math.min(...shown.keys());
        shown.get(current).tabIndex = 0;
      },
    });

    const focus = (index) =>
      list.reveal(Math.min(Math.max(index, 0), list.length() - 1)).focus({ preventScroll: true });
    const between = (a, b) => {
      const [low, high] = [Math.min(a, b), Math.max(a, b)];
      return Array.from({ length: high - low + 1 }, (_, i) => list.item(low + i));
    };
    const indexOf = (target) => Number(target.closest(".tile")?.dataset.index ?? -1);
    const toggle = (index) => {
      choose([list.item(index)], !chosen.has(list.item(index)));
      anchor = index;
    };

    root.addEventListener("focusin", ({ target }) => {
      const index = indexOf(target);
      if (index >= 0 && index !== current) {
        const before = list.shown.get(current);
        if (before) before.tabIndex = -1;
        current = index;
        target.tabIndex = 0;
      }
    });
    root.addEventListener("click", (event) => {
      const index = indexOf(event.target);
      if (index < 0) return;
      if (event.shiftKey) choose(between(anchor, index), true);
      else toggle(index);
      focus(index);
    });
    root.addEventListener("dblclick", ({ target }) => {
      const index = indexOf(target);
      if (index >= 0) location.hash = `#/image/${list.item(index)}`;
    });
    root.addEventListener("keydown", (event) => {
      const index = indexOf(event.target);
      if (index < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
      const steps = {
        ArrowLeft: -1, ArrowRight: 1, ArrowUp: -list.perRow(), ArrowDown: list.perRow(),
        PageUp: -list.perPage(), PageDown: list.perPage(), Home: -index, End: list.length() - 1 - index,
      };
      if (event.key in steps) {
        focus(index + steps[event.key]);
        if (event.shiftKey) choose(between(anchor, current), true);
        else anchor = current;
      } else if (event.key === " ") toggle(index);
      else if (event.key === "Enter") location.hash = `#/image/${list.item(index)}`;
      else return;
      event.preventDefault();
    });
    onChosen = () => {
      for (const [index, tile] of list.shown) {
        tile.setAttribute("aria-selected", chosen.has(list.item(index)));
      }
    };
    return { root, set: list.set };
  }

  // ---- Words from the page to the reader

  let timer;
  function say(message, canUndo = false) {
    const status = find("#status");
    status.firstChild.textContent = message;
    status.querySelector("button")?.remove();
    if (canUndo) status.append(make("button", { textContent: "Undo", onclick: undo }));
    status.classList.add("shown");
    clearTimeout(timer);
    timer = setTimeout(() => status.classList.remove("shown"), 10_000);
  }

  // Asks for one of some groups; with `isNew` also for a new name. Resolves to a choice, or to null.
  function ask(title, options, isNew = false) {
    const [dialog, input, list] = [find("#dialog"), find("#dialog-input"), find("#dialog .choices")];
    let answer = null;
    const button = (choice, ...parts) => make("button", {
      value: "chosen", onclick: () => { answer = choice; },
    }, ...parts);
    function fill() {
      const sought = input.value.trim();
      const fits = options.filter((group) => group.title.toLowerCase().includes(sought.toLowerCase()));
      list.replaceChildren(...fits.slice(0, 100).map((group) => button(
        { group },
        group.images.length ? paint(square(), group.images[0], 44) : "",
        make("span", { textContent: group.title }),
        make("span", { className: "count", textContent: group.size.toLocaleString("en") }),
      )));
      if (isNew && sought && !groups.has(`name ${sought}`)) {
        list.append(button({ name: sought }, make("span", { textContent: `A new name: “${sought}”` })));
      }
    }
    find("#dialog-title").textContent = title;
    input.value = "";
    input.placeholder = isNew ? "Find a cluster, or write a new name" : "Find a cluster";
    input.setAttribute("aria-label", input.placeholder);
    input.oninput = fill;
    input.onkeydown = (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault(); // which would press the first button that there is
      list.querySelector("button")?.click();
    };
    fill();
    dialog.showModal();
    return new Promise((resolve) => {
      dialog.onclose = () => resolve(answer);
    });
  }

  // ---- Views: each returns how it is brought up to date after a change

  const view = find("#view");
  const note = (text) => make("p", { className: "note", textContent: text });

  function nameField() {
    const field = make("input", { type: "text", autocomplete: "off", spellcheck: false });
    field.setAttribute("list", "names");
    field.onkeydown = (event) => {
      if (event.key === "Escape") field.value = field.dataset.name;
    };
    return field;
  }

  function fillNameField(field, group) {
    field.value = field.dataset.name = group.name ?? "";
    field.placeholder = group.name ?? group.title;
    field.setAttribute("aria-label", `Name of ${group.title}`);
    field.onchange = () => rename(group, field.value);
  }

  function overview() {
    const [TILE, GAP] = [58, 4]; // pixels of a thumbnail, at least; between them
    const inside = (wide) => wide - 2 * 12; // a card's padding and border
    const across = (wide) => Math.floor((inside(wide) + GAP) / (TILE + GAP));
    const tile = (wide) => Math.floor((inside(wide) + GAP) / across(wide)) - GAP;
    const root = make("div", { className: "list", role: "list" });
    const list = scroller(root, {
      gap: 14,
      columns: (width) => Math.floor((width + 14) / (340 + 14)),
      height: (wide) => 2 * 12 + 40 + 10 + 2 * tile(wide) + GAP,
      create() {
        const head = make("div", { className: "head" }, nameField(), make("span", { className: "count" }));
        const card = make("div", { className: "card" }, head, make("a", { className: "strip" }));
        card.setAttribute("role", "listitem");
        return card;
      },
      fill(card, group, index, wide) {
        const [head, strip] = card.children;
        fillNameField(head.firstChild, group);
        const clusters = group.clusters.length > 1 ? ` in ${group.clusters.length}` : "";
        head.lastChild.textContent = count(group.size, "image") + clusters;
        const images = group.images.slice(0, 2 * across(wide));
        while (strip.children.length > images.length) strip.lastChild.remove();
        while (strip.children.length < images.length) strip.append(square());
        images.forEach((image, i) => paint(strip.children[i], image, tile(wide)));
        strip.href = group.hash;
        strip.setAttribute("aria-label", `Images of ${group.title}`);
      },
    });
    const slider = make("input", {
      type: "range", id: "level", min: Math.min(2, data.numbers.length), max: data.numbers.length, value: level,
    });
    const shown = make("output", { htmlFor: "level" });
    slider.oninput = () => {
      level = Number(slider.value);
      refresh();
    };
    const label = make("label", { htmlFor: "level", textContent: "Join into" });
    if (data.merges.length > 1) {
      view.append(make("div", { className: "level" }, label, slider, shown));
      slider.value = level; // which the limits have clamped before they were set
    }
    view.append(root);
    return () => {
      shown.textContent = count(level, "group");
      slider.setAttribute("aria-valuetext", shown.textContent);
      list.set([...groups.values()]);
    };
  }

  function cluster(ofView) {
    const field = nameField();
    const size = make("span", { className: "count" });
    const button = make("button", { textContent: "Merge with ..." });
    const chips = make("div", { className: "chips", role: "group", aria: { label: "Nearest clusters" } });
    const about = note("");
    const images = grid("Images of the cluster");
    view.append(make("div", { className: "title" }, field, size, button), chips, about, images.root);
    return () => {
      const group = ofView();
      if (!group) {
        location.hash = "#/";
        return;
      }
      document.title = group.title;
      fillNameField(field, group);
      size.textContent = count(group.size, "image");
      button.disabled = groups.size < 2;
      button.onclick = async () => {
        const others = nearestFirst(group).filter((other) => other !== group);
        const answer = await ask(`Merge ${group.title} with`, others);
        if (answer) merge(group, answer.group);
      };
      const near = nearest(group).slice(0, 6).filter((other) => other.images.length);
      chips.hidden = !near.length;
      chips.replaceChildren(make("span", { className: "count", textContent: "Near:" }), ...near.map((other) => make(
        "a", { className: "chip", href: other.hash },
        paint(square(), other.images[0], 36), make("span", { textContent: other.title }),
      )));
      const part = group.images.length < group.size ? `${count(group.images.length, "image")} of these, from` : "From";
      const guests = group.guests ? `; ${group.guests} moved here ${group.guests > 1 ? "are" : "is"} last` : "";
      about.textContent = `${part} the centre to the rim${guests}.`;
      images.set(group.images);
    };
  }

  function listed(title, text, images, options) {
    const own = grid(title, options);
    view.append(note(text), own.root);
    return () => own.set(images);
  }

  const inCluster = { caption: (image) => groupOf[image].title };

  function borderline() {
    const of = data.borderline.length;
    return listed("Borderline images", `The ${count(of, "image")} for which the next centre is hardly farther than ` +
      "their own, the closest decisions first.", data.borderline, inCluster);
  }

  function duplicates() {
    const { pairs, cosine, same, pairCount } = data.near;
    const part = cosine.length < pairCount ? `, the first ${cosine.length.toLocaleString("en")} of them; duplicates.csv has all` : "";
    return listed("Duplicates", `${count(pairCount, "pair")} of nearly equal features, by their cosine${part}. ` +
      "A copy is the same file, byte by byte.", pairs, {
      isPaired: true,
      caption: (image, index) => `${same[index >> 1] ? "copy" : cosine[index >> 1].toFixed(3)} ${fileName(image)}`,
    });
  }

  function farOut() {
    const { outliers: images, outlierCount } = data.near;
    const part = images.length < outlierCount ? `, the first ${images.length.toLocaleString("en")} of them; outliers.csv has all` : "";
    const some = `${count(outlierCount, "image")} unlike their nearest neighbours, the strangest first${part}.`;
    return listed("Outliers", outlierCount ? some : "No image is far from all others.", images, inCluster);
  }

  function search(sought) {
    const field = make("input", {
      type: "search", value: sought, placeholder: "Part of a file's name", aria: { label: "Part of a file's name" },
    });
    const about = note("");
    const images = grid("Images found", { caption: fileName });
    const lower = data.names.map((name) => name.toLowerCase());
    field.oninput = () => {
      history.replaceState(null, "", `#/find/${encodeURIComponent(field.value)}`);
      refresh();
    };
    view.append(make("div", { className: "title" }, field), about, images.root);
    field.focus({ preventScroll: true });
    return () => {
      const part = field.value.toLowerCase();
      // By cluster, so that the thumbnails of those that are seen together are in few sheets.
      const found = [...groups.values()].flatMap(({ images: all }) => all.filter((image) => lower[image].includes(part)));
      about.textContent = `${count(found.length, "image")}. Choose one and look closer to see those that are most like it.`;
      images.set(found);
    };
  }

  function closer(image) {
    const width = Math.min(288, innerWidth - 32);
    const picture = make("div", {}, paint(square(), image, width));
    if (data.folder && location.protocol === "file:") {
      const original = make("img", { alt: "", src: `file://${[...bytes(data.folder + data.names[image])].map(escaped).join("")}` });
      original.onload = () => picture.firstChild.replaceChildren(original);
    }
    const facts = make("dl");
    const button = make("button", { textContent: "Move to ...", onclick: () => askToMove([image]) });
    const heading = make("h2", { textContent: data.names[image] });
    view.append(make("div", { className: "closer" }, picture, make("div", {}, heading, facts, button)));
    const alike = grid("The most similar images", inCluster);
    const near = neighbours ? [...neighbours.subarray(10 * image, 10 * image + 10)] : [];
    const there = near.filter((other) => other >= 0);
    if (neighbours) {
      const part = data.part ? "The most similar images that this page has" : "The most similar images";
      view.append(make("h2", { textContent: there.length ? part : "No similar images are known" }), alike.root);
    }
    const fact = (key, ...value) => [make("dt", { textContent: key }), make("dd", {}, ...value)];
    return () => {
      const group = groupOf[image];
      document.title = data.names[image];
      const home = groupOfCluster[place[image]];
      const where = `${(rank[image] + 1).toLocaleString("en")} of ${data.sizes[place[image]].toLocaleString("en")} from the centre` +
        (beyond[image] ? ", beyond 99 % of them" : "");
      facts.replaceChildren(
        ...fact("cluster", make("a", { href: group.hash, textContent: group.title })),
        ...(home === group ? [] : fact("moved from", make("a", { href: home.hash, textContent: home.title }))),
        ...fact(`in cluster ${data.numbers[place[image]]}`, where),
        ...fact("distance", distance[image].toFixed(3)),
        ...(isFinite(margin[image]) ? fact("to the next", `${margin[image].toFixed(3)} more`) : []),
        ...(outliers.has(image) ? fact("outlier", "unlike its neighbours") : []),
      );
      alike.set(there);
    };
  }

  async function askToMove(images) {
    const answer = await ask(`Move ${count(images.length, "image")} to`, nearestFirst(groupOf[images[0]]), true);
    if (!answer) return;
    choose([...chosen], false);
    move(images, answer);
  }

  // ---- Which view is shown is in the address, so that one can go back

  const VIEWS = { "": overview, borderline, find: search, cluster, name: cluster, image: closer };
  if (!data.borderline.length) delete VIEWS.borderline;
  if (data.near) Object.assign(VIEWS, { duplicates, outliers: farOut });
  const TABS = [
    ["", "Clusters"], ["borderline", "Borderline", data.borderline.length],
    ["duplicates", "Duplicates", data.near?.pairCount], ["outliers", "Outliers", data.near?.outlierCount],
    ["find", "Find"],
  ];
  let bringUpToDate = () => {};
  const scrolled = new Map(); // by address
  let address;

  function show() {
    const isFirst = address === undefined;
    if (!isFirst) scrolled.set(address, scrollY);
    address = location.hash;
    const [, kind = "", argument = ""] = address.split("/").map(decodeURIComponent);
    const byKind = {
      cluster: () => groupOfCluster[data.numbers.indexOf(Number(argument))],
      name: () => groups.get(`name ${argument}`),
    };
    const image = Number(argument);
    const isKnown = Object.hasOwn(VIEWS, kind) && (kind !== "image" || (argument && data.names[image] !== undefined));
    if (!isKnown || (kind in byKind && !byKind[kind]())) {
      location.replace("#/");
      return;
    }
    lists = [];
    view.replaceChildren();
    choose([...chosen], false);
    document.title = find("h1").textContent;
    find("#top").hidden = kind !== "";
    for (const tab of find(".tabs").children) {
      const isCurrent = tab.dataset.kind === kind || (!tab.dataset.kind && kind in byKind);
      isCurrent ? tab.setAttribute("aria-current", "page") : tab.removeAttribute("aria-current");
    }
    bringUpToDate = VIEWS[kind](kind === "image" ? image : byKind[kind] ?? argument);
    bringUpToDate();
    view.dataset.view = address;
    if (!isFirst && !view.contains(document.activeElement)) view.focus({ preventScroll: true });
    scrollTo(0, scrolled.get(address) ?? 0);
    for (const list of lists) list.draw();
  }

  function refresh() {
    regroup();
    const named = names.size ? `, ${names.size.toLocaleString("en")} of them with a name` : ", none with a name yet";
    const shown = moved.size ? `; ${count(moved.size, "image")} moved` : "";
    find("#summary").textContent = `${count(data.images, "image")} in ${count(data.numbers.length, "cluster")}${named}${shown}.`;
    find("#undo").disabled = !undone.length;
    find("#reset").disabled = isAsSaved();
    const known = [...new Set([...names.values(), ...moved.values()])].sort();
    find("#names").replaceChildren(...known.map((name) => make("option", { value: name })));
    bringUpToDate();
  }

  // ---- Files

  const escaped = (byte) => (byte === 47 ? "/" : `%${byte.toString(16).padStart(2, "0")}`);

  // The bytes of a text. Those of file names that are no UTF-8 are kept as half characters.
  function bytes(text) {
    const encode = new TextEncoder();
    const parts = text.split(/([\udc80-\udcff])/u).map((part, i) => (i % 2 ? [part.charCodeAt(0) & 0xff] : encode.encode(part)));
    return new Uint8Array(parts.flatMap((part) => [...part]));
  }

  function download(name, type, ...parts) {
    const link = make("a", { download: name, href: URL.createObjectURL(new Blob(parts, { type })) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  // The names and clusters of all images, in their order; those that are not on the page are fetched.
  async function everyImage() {
    if (!data.part) {
      const order = Array.from(record.keys()).sort((a, b) => record[a] - record[b]);
      return order.map((image) => [data.names[image], place[image]]);
    }
    if (!window.maectAll) {
      await new Promise((resolve, reject) => {
        document.head.append(make("script", { src: "clusters/all.js", onload: resolve, onerror: reject }));
      });
    }
    const places = unpack(window.maectAll.place);
    return window.maectAll.names.map((name, i) => [name, places[i]]);
  }

  async function saveLabels() {
    let images;
    try {
      images = await everyImage();
    } catch {
      say("clusters/all.js is missing: keep the folder clusters beside this page.");
      return;
    }
    const cell = (text) => (/^\s|[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const lines = ["image,label\n"];
    const numbers = new Set(); // labels that are no names
    for (const [image, cluster] of images) {
      const label = moved.get(image) ?? names.get(data.numbers[cluster]);
      if (label) lines.push(`${cell(image)},${cell(label)}\n`);
      if (/^cluster \d+$/.test(label)) numbers.add(label);
    }
    if (lines.length === 1) {
      say("No cluster has a name yet: labels.csv would be empty.");
      return;
    }
    const without = images.length - lines.length + 1;
    download("labels.csv", "text/csv", ...lines.map(bytes));
    const left = without ? ` ${count(without, "image")} without a name ${without > 1 ? "are" : "is"} left out.` : "";
    const of = numbers.size ? ` Labels that are no names yet: ${[...numbers].sort().join(", ")}.` : "";
    say(`labels.csv has ${count(lines.length - 1, "image")}.${left}${of}`);
  }

  async function loadNames(file) {
    let given;
    try {
      given = JSON.parse(await file.text());
    } catch {
      say(`${file.name} is not JSON. Nothing is changed.`);
      return;
    }
    const wrong = problem(given);
    if (wrong) say(`${file.name} ${wrong}. Nothing is changed.`);
    else edit(`The names are those of ${file.name}.`, () => setContent(given));
  }

  // ---- Start

  find("#save-names").onclick = () =>
    download("names.json", "application/json", `${JSON.stringify(content(), null, 2)}\n`);
  find("#save-labels").onclick = saveLabels;
  find("#load-names").onclick = () => find("#file").click();
  find("#file").onchange = async ({ target }) => {
    if (target.files.length) await loadNames(target.files[0]);
    target.value = ""; // so that the same file can be loaded again
  };
  find("#reset").onclick = () => edit(data.saved ? "The names are those of the run." : "All names are removed.", () => setContent(data.saved));
  find("#undo").onclick = undo;
  find("#move").onclick = () => askToMove([...chosen]);
  find("#clear").onclick = () => choose([...chosen], false);
  addEventListener("keydown", (event) => {
    const isText = event.target.matches("input[type=text], input[type=search]");
    if (event.key === "z" && (event.ctrlKey || event.metaKey) && !isText) {
      event.preventDefault();
      undo();
    }
    if (event.key === "Escape" && !find("#dialog").open) choose([...chosen], false);
  });
  addEventListener("storage", (event) => {
    if (event.key !== KEPT) return;
    restore();
    say("Changed in another window.");
    refresh();
  });
  addEventListener("hashchange", show);
  history.scrollRestoration = "manual";
  document.body.classList.toggle("crisp", data.sheets.crisp);
  for (const [kind, title, number] of TABS) {
    if (!Object.hasOwn(VIEWS, kind)) continue;
    const tab = make("a", { href: `#/${kind}`, textContent: title });
    tab.dataset.kind = kind;
    if (number !== undefined) tab.append(" ", make("small", { textContent: number.toLocaleString("en") }));
    find(".tabs").append(tab);
  }
  restore();
  refresh();
  show();
}
