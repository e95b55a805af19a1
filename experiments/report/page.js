// Records: sorting by a click on a column's head, filtering by words that a row must all have.
// Elsewhere: a link opens what it leads to, Escape makes an enlarged figure small. On a narrow screen a row stands as a
// list, each cell behind its column's name.
"use strict";
const table = document.querySelector("#records table");
const body = table.tBodies[0];
const rows = Array.from(body.rows);
const box = document.querySelector("#filter");
const count = document.querySelector("#count");
const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

function filter() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of rows) {
    const fits = words.every((word) => texts.get(row).includes(word));
    row.hidden = !fits;
    shown += fits;
  }
  count.textContent = `${shown} of ${rows.length} records`;
}

function sort(head) {
  const column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const numeric = head.classList.contains("number");
  const missing = (text) => text === "" || text === "-";
  rows.sort((one, two) => {
    const [a, b] = [value(one), value(two)];
    if (missing(a) || missing(b)) return missing(a) - missing(b); // what was not measured stays below
    const order = numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true });
    return up ? order : -order;
  });
  body.append(...rows);
}

for (const head of table.tHead.rows[0].cells) head.firstElementChild.addEventListener("click", () => sort(head));
box.addEventListener("input", filter);
filter();

for (const each of document.querySelectorAll(".scroll table")) {
  const heads = Array.from(each.tHead.rows[0].cells, (head) => head.textContent);
  for (const row of each.tBodies[0].rows) for (const cell of row.cells) cell.dataset.head = heads[cell.cellIndex];
}

function unfold() {
  let target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const found = target;
  for (; target; target = target.parentElement) if (target.tagName === "DETAILS") target.open = true;
  if (found) found.scrollIntoView();
}

addEventListener("hashchange", unfold);
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const zoomed of document.querySelectorAll(".zoom > input:checked")) zoomed.checked = false;
});
unfold();
