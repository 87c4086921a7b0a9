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
