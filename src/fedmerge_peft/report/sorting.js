"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [Number(value(a)), Number(value(b))];
      if (head.dataset.kind !== "number") return value(a).localeCompare(value(b));
      return Number.isNaN(x) || Number.isNaN(y) ? 0 : x === y ? 0 : x < y ? -1 : 1;
    };
    const missing = (row) => value(row) === "" || value(row) === "NaN";
    const rows = [...table.tBodies[0].rows];
    const known = rows.filter((row) => !missing(row)).sort(compare);
    if (down) known.reverse();
    table.tBodies[0].append(...known, ...rows.filter(missing));
  }));
}
