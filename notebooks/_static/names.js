// A control is called by the words that it shows: the theme names search and folded cells otherwise,
// so that who speaks to a page, or hears it, gets another name than the one that is shown.
window.addEventListener("load", () => {
  for (const control of document.querySelectorAll("button[aria-label], summary[aria-label]")) {
    const shown = control.textContent.replace(/\s+/g, " ").trim();
    const name = control.getAttribute("aria-label");
    if (name.includes(shown) && shown) continue;
    control.removeAttribute("aria-label");
    if (!shown) control.title = name; // a picture alone
    for (const icon of control.querySelectorAll("i")) icon.setAttribute("aria-hidden", "true");
  }
});
