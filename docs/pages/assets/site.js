// A click on a name copies it; without a clipboard, it is selected.
document.addEventListener("click", async (event) => {
  const name = event.target.closest("code.copy");
  if (!name) return;
  getSelection().selectAllChildren(name);
  try {
    await navigator.clipboard.writeText(name.textContent);
    name.classList.add("copied");
    setTimeout(() => name.classList.remove("copied"), 800);
  } catch {}
});

// A click on the title of a column sorts its table: numbers from the largest, texts from A.
for (const title of document.querySelectorAll(".sortable th")) {
  const button = document.createElement("button");
  button.append(...title.childNodes);
  title.append(button);
  button.addEventListener("click", () => {
    const body = title.closest("table").tBodies[0];
    const value = (row) => row.cells[title.cellIndex].textContent;
    const numbers = [...body.rows].some((row) => !isNaN(parseFloat(value(row))));
    const first = numbers ? "descending" : "ascending";
    const order = title.ariaSort === first ? (numbers ? "ascending" : "descending") : first;
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
    const filled = [...body.rows].filter((row) => value(row)).sort((a, b) => sign * compare(a, b));
    body.append(...filled, ...[...body.rows].filter((row) => !value(row)));
    for (const other of title.parentNode.cells) other.ariaSort = null;
    title.ariaSort = order;
  });
}
