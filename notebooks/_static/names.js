// A control that shows words is called by them: the theme names search and folded cells otherwise,
// so that who speaks to a page, or hears it, gets another name than the one that is shown.
window.addEventListener("load", () => {
  for (const control of document.querySelectorAll("button[aria-label], summary[aria-label]")) {
    const shown = control.textContent.replace(/\s+/g, " ").trim();
    if (shown && !control.getAttribute("aria-label").includes(shown)) {
      control.removeAttribute("aria-label");
    }
    for (const icon of control.querySelectorAll("i")) {
      icon.setAttribute("aria-hidden", "true"); // drawn, not said
    }
  }
});
