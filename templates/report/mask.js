// Masks as fuse.ir.serial writes them, evaluated: which tiles of a mask are empty, partial or full.
"use strict";
const Mask = (() => {
  const EMPTY = 0, PARTIAL = 1, FULL = 2;
  const BITS = {int8: 8, int16: 16, int32: 32, uint8: 8};
  const COMPARED = {
    eq: (a, b) => a === b, ne: (a, b) => a !== b, lt: (a, b) => a < b,
    le: (a, b) => a <= b, gt: (a, b) => a > b, ge: (a, b) => a >= b,
  };
  // Truth values are 0 and 1. Quotients and remainders round towards minus infinity, halves to even numbers.
  const VALUES = {
    neg: a => -a, abs: Math.abs, sign: Math.sign, floor: Math.floor, ceil: Math.ceil, trunc: Math.trunc,
    isnan: a => +Number.isNaN(a), isinf: a => +(Math.abs(a) === Infinity), not: a => 1 - a,
    add: (a, b) => a + b, sub: (a, b) => a - b, mul: (a, b) => a * b, div: (a, b) => a / b,
    floordiv: (a, b) => Math.floor(a / b), mod: (a, b) => a - b * Math.floor(a / b),
    minimum: Math.min, maximum: Math.max, and: (a, b) => a & b, or: (a, b) => a | b, xor: (a, b) => a ^ b,
    where: (c, a, b) => (c ? a : b), cast: a => a,
  };
  for (const name in COMPARED) VALUES[name] = (a, b) => +COMPARED[name](a, b);

  // Floats are written as Python's float.hex does.
  function number(value) {
    if (typeof value !== "string") return +value;
    const found = /^(-?)0x(\d)\.?([0-9a-f]*)p([+-]\d+)$/.exec(value);
    if (!found) return {inf: Infinity, "-inf": -Infinity}[value] ?? NaN;
    const [, sign, whole, part, exponent] = found;
    return (sign ? -1 : 1) * parseInt(whole + part, 16) * 2 ** (+exponent - 4 * part.length);
  }

  // As a tensor of the dtype holds it.
  function held(x, dtype) {
    if (dtype === "bool") return +(x !== 0);
    if (dtype === "float32") return Math.fround(x);
    if (dtype.startsWith("float")) return x;
    x = Math.trunc(x);
    if (!(dtype in BITS)) return x;
    const size = 2 ** BITS[dtype], least = dtype === "uint8" ? 0 : -size / 2;
    return (((x - least) % size) + size) % size + least;
  }

  // What is read of a node, whatever its kind: [kind, dtype, name, operands].
  const parts = ([kind, dtype, ...rest]) => ({kind, dtype, name: rest[0], operands: rest[1] ?? []});

  // A function of (q, k). call: {sizes: by symbol, batch: by axis, load: (operand, coordinates) => number}
  function evaluator(predicate, call) {
    const built = [];
    for (const node of predicate.nodes) {
      const {kind, dtype, name, operands} = parts(node), args = operands.map(i => built[i]);
      built.push(functionOf(kind, dtype, name, args, call));
    }
    return built[predicate.roots.mask];
  }

  function functionOf(kind, dtype, name, args, call) {
    if (kind === "Const") { const value = held(number(name), dtype); return () => value; }
    if (kind === "Symbol") { const value = call.sizes[name]; return () => value; }
    if (kind === "Index") {
      if (name === "q") return q => q;
      if (name === "k") return (q, k) => k;
      const value = call.batch[name] ?? 0;
      return () => value;
    }
    if (kind === "Load") return (q, k) => call.load(name, args.map(f => f(q, k)));
    const value = VALUES[name], [a, b, c] = args, rounds = dtype !== "int64" && dtype !== "bool" || name === "cast";
    const plain = c ? (q, k) => value(a(q, k), b(q, k), c(q, k)) : b ? (q, k) => value(a(q, k), b(q, k)) : (q, k) => value(a(q, k));
    return rounds ? (q, k) => held(plain(q, k), dtype) : plain;
  }

  // The least and the largest value of every node where q and k lie in a tile: [low, high]; what is read may be anything.
  function range(predicate, call, q, k) {
    const found = [];
    for (const node of predicate.nodes) {
      const {kind, dtype, name, operands} = parts(node);
      found.push(rangeOf(kind, dtype, name, operands.map(i => found[i]), call, q, k));
    }
    return found[predicate.roots.mask];
  }

  function rangeOf(kind, dtype, name, args, call, q, k) {
    const anything = dtype === "bool" ? [0, 1] : [-Infinity, Infinity], point = x => [x, x];
    if (dtype.includes("float") || kind === "Load") return anything;
    if (kind === "Const") return point(number(name));
    if (kind === "Symbol") return point(call.sizes[name]);
    if (kind === "Index") return name === "q" ? q : name === "k" ? k : point(call.batch[name] ?? 0);
    const [a, b] = args;
    if (args.some(r => r[0] === -Infinity || r[1] === Infinity)) return anything;
    switch (name) {
      case "add": return [a[0] + b[0], a[1] + b[1]];
      case "sub": return [a[0] - b[1], a[1] - b[0]];
      case "neg": return [-a[1], -a[0]];
      case "not": return [1 - a[1], 1 - a[0]];
      case "and": case "minimum": return dtype === "bool" || name === "minimum" ? [Math.min(a[0], b[0]), Math.min(a[1], b[1])] : anything;
      case "or": case "maximum": return dtype === "bool" || name === "maximum" ? [Math.max(a[0], b[0]), Math.max(a[1], b[1])] : anything;
      case "lt": return [+(a[1] < b[0]), +(a[0] < b[1])];
      case "le": return [+(a[1] <= b[0]), +(a[0] <= b[1])];
      case "gt": return [+(a[0] > b[1]), +(a[1] > b[0])];
      case "ge": return [+(a[0] >= b[1]), +(a[1] >= b[0])];
      case "floordiv": return b[0] > 0 && b[0] === b[1] ? [Math.floor(a[0] / b[0]), Math.floor(a[1] / b[0])] : anything;
      case "mul": {
        const corners = [a[0] * b[0], a[0] * b[1], a[1] * b[0], a[1] * b[1]];
        return [Math.min(...corners), Math.max(...corners)];
      }
      default: return anything;
    }
  }

  // {rows, columns, of: a class for each tile, row by row, count: by class}
  function classes(predicate, call, rowsOfTile, keysOfTile) {
    const {q_len, kv_len} = call.sizes, seen = evaluator(predicate, call);
    const rows = Math.ceil(q_len / rowsOfTile), columns = Math.ceil(kv_len / keysOfTile);
    const of = new Uint8Array(rows * columns), count = [0, 0, 0];
    for (let r = 0; r < rows; r++) {
      const q = [r * rowsOfTile, Math.min((r + 1) * rowsOfTile, q_len) - 1];
      for (let c = 0; c < columns; c++) {
        const k = [c * keysOfTile, Math.min((c + 1) * keysOfTile, kv_len) - 1];
        const [least, most] = range(predicate, call, q, k);
        const found = most === 0 ? EMPTY : least === 1 ? FULL : classOf(seen, q, k);
        of[r * columns + c] = found;
        count[found]++;
      }
    }
    return {rows, columns, of, count};
  }

  // Entry by entry, until both kinds have been met.
  function classOf(seen, [q0, q1], [k0, k1]) {
    const first = seen(q0, k0);
    for (let q = q0; q <= q1; q++) for (let k = k0; k <= k1; k++) if (seen(q, k) !== first) return PARTIAL;
    return first ? FULL : EMPTY;
  }

  // Examples of what masks read, by role: functions of coordinates. See fuse.report.picture.
  const CUTS = [0, 1 / 2, 5 / 6, 1];
  function example({role, at, length, extreme}, sizes) {
    const n = role === "documents" ? Math.max(sizes.q_len, sizes.kv_len) : sizes[length];
    const share = x => (Math.min(Math.max(x, 0), n - 1) + 0.5) / n, part = x => CUTS.findIndex(cut => share(x) < cut) - 1;
    const truth = shown => (extreme ? (shown ? 0 : -Infinity) : +shown), keys = sizes.kv_len;
    const [i, j] = at;
    return {
      padding: c => truth(share(c[i]) < 3 / 4),
      documents: c => part(c[i]),
      first: c => Math.floor(CUTS[part(c[i])] * keys),
      end: c => Math.floor(CUTS[part(c[i]) + 1] * keys),
      length: () => Math.floor(keys * 3 / 4),
      start: () => Math.floor(keys / 8),
      positions: c => c[i],
      listed: c => (c[j] < c[i] ? 2 : +(c[j] === c[i])),
      entries: c => truth((Math.floor(c[i] / sizes.q_len * 8) * 5 + Math.floor(c[j] / keys * 8) * 3) % 4 !== 0),
    }[role];
  }

  function examples(list, sizes) {
    const made = new Map(list.map(e => [e.operand, example(e, sizes)]));
    return (operand, coordinates) => made.get(operand)(coordinates);
  }

  return {EMPTY, PARTIAL, FULL, classes, evaluator, examples, operators: Object.keys(VALUES)};
})();
if (typeof module !== "undefined") module.exports = Mask;
