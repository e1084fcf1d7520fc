// The form above the table of all claims hides the rows that do not fit it. Without this script the form stays hidden
// and the table whole.
(() => {
  const form = document.getElementById("filter");
  const rows = [...document.querySelectorAll("#all-claims tbody tr")];
  const update = () => {
    const wanted = Object.fromEntries(new FormData(form));
    const words = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) {
      const chosen = ["figure", "verdict", "profile"].every(key => !wanted[key] || row.dataset[key] === wanted[key]);
      row.hidden = !(chosen && words.every(word => row.textContent.toLowerCase().includes(word)));
    }
    form.querySelector("output").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} shown`;
  };
  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("reset", () => setTimeout(update));
  form.addEventListener("submit", event => event.preventDefault());
  update();
})();
