"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : cell.dataset.v === "" ? -Infinity : Number(cell.dataset.v);
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a, column), y = value(b, column);
      return typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
    });
    body.append(...(down ? rows.reverse() : rows));
  }));
  const section = table.closest("section");
  const filter = section.querySelector("input[type=search]");
  const count = section.querySelector("output");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const names = [...row.cells].filter((cell) => cell.dataset.v === undefined).map((cell) => cell.textContent);
      row.hidden = !words.every((word) => names.join(" ").toLowerCase().includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${body.rows.length} rows`;
  });
  section.querySelector("button.csv").addEventListener("click", () => {
    const quote = (text) => `"${text.replaceAll('"', '""')}"`;
    const lines = [heads.map((head) => quote(head.textContent.trim())).join(",")];
    for (const row of body.rows) {
      lines.push([...row.cells].map((cell) => cell.dataset.v ?? quote(cell.textContent)).join(","));
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    link.download = "skillmerge.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  });
}
document.querySelector("button.theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
