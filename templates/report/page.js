// What moves in a report: search, filters, keys, pictures of masks, kernels with numbered lines.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const make = (name, properties = {}, ...inside) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...inside);
    return element;
  };
  const groups = all(".group"), entries = new Map(all("nav li").map(li => [li.dataset.group, li]));
  const search = one("#search"), filters = all("[data-filter]");

  // ------------------------------------------------------------------------------------------------- search and filter
  let filter = "";
  const words = new Map(groups.map(group => [group, textOf(group)]));

  // Kernels count by their names and outlines, not by each of their lines.
  function textOf(group) {
    const copy = group.cloneNode(true);
    all("pre.long", copy).forEach(pre => pre.remove());
    return copy.textContent.toLowerCase();
  }

  function show() {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const group of groups) {
      const fits = (!filter || group.dataset.status === filter) && wanted.every(word => words.get(group).includes(word));
      group.hidden = entries.get(group.id).hidden = !fits;
      count += fits;
    }
    for (const button of filters) button.setAttribute("aria-pressed", String(button.dataset.filter === filter));
    one(".found").textContent = count < groups.length ? `${count} of ${groups.length} groups` : "";
    one(".nothing").hidden = count > 0 || groups.length === 0;
  }

  search.addEventListener("input", show);
  for (const button of filters) button.addEventListener("click", () => { filter = button.dataset.filter; show(); });

  // -------------------------------------------------------------------------------------------------------------- keys
  const root = document.documentElement;
  const kept = name => { try { return localStorage.getItem(name); } catch { return null; } };
  const keep = (name, value) => { try { localStorage.setItem(name, value); } catch { /* a page from a file may have no memory */ } };
  if (kept("fuse-theme")) root.dataset.theme = kept("fuse-theme");

  function turn() {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    keep("fuse-theme", root.dataset.theme);
    pictures.forEach(picture => picture.draw());
  }

  let current = -1;
  function step(by) {
    const shown = groups.filter(group => !group.hidden);
    if (!shown.length) return;
    const at = shown.indexOf(groups[current]);
    go(shown[Math.min(Math.max(at < 0 ? (by > 0 ? 0 : shown.length - 1) : at + by, 0), shown.length - 1)]);
  }

  function go(group) {
    current = groups.indexOf(group);
    entries.forEach((li, id) => li.classList.toggle("current", id === group.id));
    group.focus({preventScroll: true});
    group.scrollIntoView({block: "start"});
  }

  function toggle() {
    const inside = all("details.kernel, details.passes", groups[Math.max(current, 0)]), open = inside.some(d => !d.open);
    inside.forEach(d => { d.open = open; });
  }

  const KEYS = {
    "/": () => { search.focus(); search.select(); }, j: () => step(1), k: () => step(-1), o: toggle, t: turn,
    "?": () => one("#keys").showModal(),
    f: () => filters[(filters.findIndex(b => b.dataset.filter === filter) + 1) % filters.length].click(),
  };
  document.addEventListener("keydown", event => {
    if (event.key === "Escape" && !one("#keys").open) { search.value = ""; search.blur(); show(); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea") || one("#keys").open) return;
    if (Object.hasOwn(KEYS, event.key)) { event.preventDefault(); KEYS[event.key](); }
  });
  one("#theme").addEventListener("click", turn);
  one("#help").addEventListener("click", KEYS["?"]);

  // -------------------------------------------------------------------------------------------------------------- code
  const LANGUAGES = {
    python: {
      comment: "#.*", string: String.raw`(?:"""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')`,
      words: "and as assert break class continue def elif else except False finally for from if import in is lambda None not or pass raise return True try while with yield",
    },
    cpp: {
      comment: String.raw`//.*|/\*[\s\S]*?\*/`, string: String.raw`"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+'`,
      words: "alignas auto bool break case char class const constexpr continue default do double else enum extern false float for if inline int int16_t int32_t int64_t int8_t namespace new nullptr operator return short signed sizeof static struct switch template this true typedef typename uint16_t uint32_t uint64_t uint8_t unsigned using void while",
    },
  };

  // Pairs of [kind, text]: c comment, s string, k keyword, d number, or "".
  function* tokens(text, language) {
    const {comment, string, words} = LANGUAGES[language];
    const number = String.raw`\b(?:0x[\da-fA-F]+|\d[\d.]*(?:[eE][+-]?\d+)?)[uUlLfF]*\b`;
    const found = new RegExp(`(${comment})|(${string})|\\b(${words.replaceAll(" ", "|")})\\b|(${number})`, "g");
    let end = 0;
    for (const match of text.matchAll(found)) {
      yield ["", text.slice(end, match.index)];
      yield ["cskd"[match.slice(1).findIndex(part => part !== undefined)], match[0]];
      end = match.index + match[0].length;
    }
    yield ["", text.slice(end)];
  }

  // Lines of nodes.
  function coloured(text, language) {
    const lines = [[]];
    for (const [kind, token] of tokens(text, language)) {
      token.split("\n").forEach((part, i) => {
        if (i) lines.push([]);
        if (part) lines.at(-1).push(kind ? make("span", {className: kind, textContent: part}) : part);
      });
    }
    return lines;
  }

  function number(pre) {
    if (!pre || pre.dataset.done) return;
    pre.dataset.done = "1";
    const lines = coloured(pre.textContent.replace(/\n$/, ""), pre.dataset.language);
    pre.replaceChildren(...lines.map((inside, i) => make("span", {className: "line", id: `${pre.dataset.lines}-${i + 1}`},
      make("span", {className: "number", textContent: i + 1}), ...inside, "\n")));
  }

  for (const details of all("details.kernel")) {
    if (details.open) number(one("pre.long", details));
    details.addEventListener("toggle", () => number(one("pre.long", details)));
  }
  for (const pre of all(".source pre")) {
    const texts = all(".text", pre), lines = coloured(texts.map(t => t.textContent).join("\n"), "python");
    texts.forEach((text, i) => text.replaceChildren(...lines[i]));
  }

  // A link to a line opens its kernel first.
  function follow() {
    const id = decodeURIComponent(location.hash.slice(1)), details = document.getElementById(id.replace(/-\d+$/, ""));
    if (details?.matches("details.kernel")) {
      details.open = true;
      number(one("pre.long", details));
    }
    const target = document.getElementById(id);
    all(".line.target").forEach(line => line.classList.remove("target"));
    if (target?.matches(".line")) {
      target.classList.add("target");
      target.scrollIntoView({block: "center"});
    } else if (target?.matches(".group")) go(target);
  }
  addEventListener("hashchange", follow);
  document.addEventListener("click", event => {
    const link = event.target.closest("a[href^='#']");
    if (link && link.hash === location.hash) { event.preventDefault(); follow(); }
  });

  // A formula that is wider than its column takes the whole width, with the mask below.
  function fit() {
    for (const pair of all(".pair")) {
      pair.classList.remove("wide");
      const lines = one(".lines", pair);
      pair.classList.toggle("wide", lines.scrollWidth > lines.clientWidth);
    }
  }
  addEventListener("resize", fit);

  // ---------------------------------------------------------------------------------------------------------- pictures
  const WIDEST = 8192, MOST = 512 * 512, SIDE = 256;
  const data = JSON.parse(one("#pictures").textContent);

  class MaskPicture {
    constructor(figure, {predicate, sizes, batch, tile, examples}) {
      Object.assign(this, {figure, predicate, sizes: {...sizes}, batch, tile: [...tile], examples, at: null});
      this.canvas = one("canvas", figure);
      this.indices = Object.fromEntries(batch.map(axis => [axis, 0]));
      this.fields();
      this.canvas.addEventListener("pointermove", event => this.point(event));
      this.canvas.addEventListener("pointerleave", () => this.tell(null));
      this.canvas.addEventListener("keydown", event => this.key(event));
      this.compute();
    }

    fields() {
      const form = one(".sizes", this.figure);
      const field = (name, value, most, set) => {
        const input = make("input", {type: "number", min: 1, max: most, value, name});
        input.addEventListener("change", () => {
          set(input.value = Math.min(Math.max(Math.round(+input.value) || 1, +input.min), most));
          this.compute();
        });
        form.append(make("label", {}, name, input));
        return input;
      };
      for (const name of ["q_len", "kv_len"]) {
        this.sizes[name] = Math.min(this.sizes[name] || 512, WIDEST);
        field(name === "q_len" ? "queries" : "keys", this.sizes[name], WIDEST, n => { this.sizes[name] = +n; });
      }
      field("tile queries", this.tile[0], WIDEST, n => { this.tile[0] = +n; });
      field("tile keys", this.tile[1], WIDEST, n => { this.tile[1] = +n; });
      for (const axis of this.batch) {
        const most = Math.max(this.sizes[`B${axis.slice(1)}`] - 1, 0);
        field(`batch ${axis.slice(1)}`, 0, most, n => { this.indices[axis] = +n; }).min = 0;
      }
      form.addEventListener("submit", event => event.preventDefault());
    }

    compute() {
      const [rows, keys] = this.tile, {q_len, kv_len} = this.sizes;
      this.found = null;
      if (Math.ceil(q_len / rows) * Math.ceil(kv_len / keys) > MOST) {
        this.tell(null, "Too many tiles to draw: choose larger ones.");
        return;
      }
      const call = {sizes: this.sizes, batch: this.indices, load: Mask.examples(this.examples, this.sizes)};
      this.found = Mask.classes(this.predicate, call, rows, keys);
      const {count, of} = this.found;
      count.forEach((n, i) => { one(`[data-class="${i}"]`, this.figure).value = `${n} (${(100 * n / of.length).toFixed(1)} %)`; });
      const shares = ["empty", "partial", "full"].map((name, i) => `${count[i]} ${name}`).join(", ");
      this.canvas.setAttribute("aria-label", `${this.found.rows} by ${this.found.columns} tiles of queries by keys: ${shares}`);
      this.at = null;
      this.tell(null);
      this.draw();
    }

    // Keys run to the right, queries down, both to one scale; lines between tiles where there is room.
    draw() {
      if (!this.found) return;
      const {rows, columns, of} = this.found, {q_len, kv_len} = this.sizes, scale = SIDE / Math.max(q_len, kv_len);
      const ratio = devicePixelRatio || 1, style = getComputedStyle(root), context = this.canvas.getContext("2d");
      const width = Math.max(kv_len * scale, 24), height = Math.max(q_len * scale, 24);
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(height * ratio);
      this.canvas.style.width = `${width}px`;
      const colours = ["empty", "partial", "full"].map(name => style.getPropertyValue(`--${name}`));
      const x = c => Math.round(Math.min(c * this.tile[1] / kv_len, 1) * this.canvas.width);
      const y = r => Math.round(Math.min(r * this.tile[0] / q_len, 1) * this.canvas.height);
      const gap = Math.min(this.canvas.width / columns, this.canvas.height / rows) >= 6 ? 1 : 0;
      context.fillStyle = style.getPropertyValue("--back");
      context.fillRect(0, 0, this.canvas.width, this.canvas.height);
      for (let r = 0; r < rows; r++) {
        for (let c = 0; c < columns; c++) {
          context.fillStyle = colours[of[r * columns + c]];
          context.fillRect(x(c), y(r), Math.max(x(c + 1) - x(c) - gap, 1), Math.max(y(r + 1) - y(r) - gap, 1));
        }
      }
      if (this.at) {
        const [r, c] = this.at;
        context.strokeStyle = style.getPropertyValue("--text");
        context.lineWidth = 2 * ratio;
        context.strokeRect(x(c), y(r), x(c + 1) - x(c), y(r + 1) - y(r));
      }
    }

    tell(at, text = "") {
      this.at = at;
      if (at) {
        const [r, c] = at, [rows, keys] = this.tile, {q_len, kv_len} = this.sizes;
        const name = ["empty", "partial", "full"][this.found.of[r * this.found.columns + c]];
        const span = (first, size, most) => `${first * size} to ${Math.min((first + 1) * size, most) - 1}`;
        text = `queries ${span(r, rows, q_len)}, keys ${span(c, keys, kv_len)}: ${name}`;
      }
      one(".told", this.figure).textContent = text;
      this.draw();
    }

    point(event) {
      if (!this.found) return;
      const box = this.canvas.getBoundingClientRect(), {rows, columns} = this.found;
      const place = (share, size, length, most) => Math.min(Math.floor(Math.max(share, 0) * length / size), most - 1);
      const r = place((event.clientY - box.top) / box.height, this.tile[0], this.sizes.q_len, rows);
      const c = place((event.clientX - box.left) / box.width, this.tile[1], this.sizes.kv_len, columns);
      if (!this.at || this.at[0] !== r || this.at[1] !== c) this.tell([r, c]);
    }

    key(event) {
      const by = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
      if (!by || !this.found) return;
      event.preventDefault();
      const [r, c] = this.at ?? [0, 0], {rows, columns} = this.found, moved = this.at ? by : [0, 0];
      this.tell([Math.min(Math.max(r + moved[0], 0), rows - 1), Math.min(Math.max(c + moved[1], 0), columns - 1)]);
    }
  }

  const pictures = all("[data-picture]").map(figure => new MaskPicture(figure, data[figure.dataset.picture]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => pictures.forEach(picture => picture.draw()));
  show();
  fit();
  if (location.hash) follow();
})();
