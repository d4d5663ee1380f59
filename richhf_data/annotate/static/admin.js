// The administrator's buttons.
const token = document.getElementById("admin").dataset.token;

async function act(action, body) {
  const headers = { "content-type": "application/json", accept: "application/json", "x-token": token };
  const response = await fetch(`/api/admin/${action}`, { method: "POST", headers, body: JSON.stringify(body) });
  if (response.ok) location.reload();
  else alert((await response.json()).error);
}

for (const button of document.querySelectorAll("[data-action]")) {
  const { action, id } = button.dataset;
  button.addEventListener("click", () => {
    if (action !== "revoke" || confirm("End this link? The answers stay.")) act(action, id ? { id: Number(id) } : {});
  });
}
const invite = document.getElementById("invite");
if (invite) {
  invite.addEventListener("submit", (event) => {
    event.preventDefault();
    act("invite", { name: new FormData(invite).get("name") });
  });
}
for (const image of document.querySelectorAll("img[data-radius]")) { // a disk's radius is a share of the picture's height
  const round = () => {
    const radius = (Number(image.dataset.radius) * image.naturalHeight) / image.naturalWidth;
    for (const ellipse of image.parentElement.querySelectorAll("ellipse")) ellipse.setAttribute("rx", radius);
  };
  if (image.complete) round(); else image.addEventListener("load", round);
}
