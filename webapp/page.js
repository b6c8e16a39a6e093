() => {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelector("#stop").click();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      const panel = event.target.closest("[role=tabpanel]");
      const button = panel?.querySelector("button.go");
      if (button) { event.preventDefault(); event.stopPropagation(); button.click(); }
    }
  }, true);
  document.addEventListener("blur", (event) => { // Gradio would silently set the nearest number of the slider
    if (event.target.matches?.(".block:has([type=range]) input:out-of-range")) event.stopPropagation();
  }, true);
  document.addEventListener("click", (event) => {
    if (event.target.closest("#stop"))
      setTimeout(() => document.querySelectorAll(".writing").forEach((text) => text.classList.remove("writing")), 400);
  });
}
