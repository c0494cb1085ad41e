"use strict";
setInterval(async () => {
  if (document.hidden || !getSelection().isCollapsed) return;
  try {
    const answer = await fetch(document.getElementById("refresh").href, {credentials: "same-origin"});
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const part of document.querySelectorAll("[data-live]")) {
      const fresh = page.getElementById(part.id);
      if (fresh && !part.contains(document.activeElement) && part.innerHTML !== fresh.innerHTML) part.innerHTML = fresh.innerHTML;
    }
  } catch { /* the next one may come through */ }
}, 2000);
