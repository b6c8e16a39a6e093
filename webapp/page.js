() => {
  const reveal = (part) => { // once it is laid out
    const { top, bottom } = part.getBoundingClientRect();
    if (top < 0 || bottom > innerHeight) part.scrollIntoView({ block: "center" });
  };
  const markOld = () => document.querySelectorAll("[data-prompt]").forEach((text) => { // the text of another prompt
    const prompt = document.querySelector(`#${text.dataset.of} textarea`);
    text.toggleAttribute("data-old", prompt.value !== text.dataset.prompt);
  });
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
    if (event.target.closest("#write")) { // on a phone, the text is below the fields
      const status = document.querySelector("#status");
      if (status.getBoundingClientRect().top > 0.6 * innerHeight) status.scrollIntoView({ block: "start" });
    }
  });
  document.addEventListener("input", (event) => {
    markOld();
    if (event.target.matches?.("#so-far textarea")) document.querySelector("#predict").click();
  });
  new MutationObserver((changes) => {
    markOld();
    for (const node of changes.flatMap((change) => [...change.addedNodes])) {
      const fault = node.matches?.(".fault") ? node : node.querySelector?.(".fault");
      if (fault) setTimeout(reveal, 250, fault);
    }
  }).observe(document.body, { childList: true, subtree: true });
}
