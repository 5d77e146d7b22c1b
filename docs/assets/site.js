"use strict";
// What the theme leaves out for screen readers and keyboards: names of the search and of the menus, and tables that scroll.
(() => {
  const name = (selector, text) => document.querySelectorAll(selector).forEach((element) => element.setAttribute("aria-label", text));
  name(".md-search[role=dialog]", "Search");
  name("#__search", "Show the search");
  name("#__drawer", "Show the navigation");
  name("input.md-nav__toggle", "Show this part of the navigation");
  const focusable = () => document.querySelectorAll(".md-typeset__scrollwrap").forEach((region) => {
    if (region.scrollWidth > region.clientWidth) region.tabIndex = 0;
    else region.removeAttribute("tabindex");
  });
  focusable();
  addEventListener("load", focusable);
  addEventListener("resize", focusable);
})();
