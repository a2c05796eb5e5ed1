// Browsers start no worker for a page that was opened as a file. The search of the theme gets a frame with a worker's messages;
// else the theme would fetch such a script from the network.
"use strict";
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    this.loaded = new Promise(resolve => { frame.onload = resolve; });
    document.body.append(frame);
    this.inside = frame.contentWindow;
    addEventListener("message", event => {
      if (event.source === this.inside) this.dispatchEvent(new MessageEvent("message", {data: event.data}));
    });
    const answers = "<script>postMessage = data => parent.postMessage(data, '*')</script>";
    this.inside.document.open();
    this.inside.document.write(`${answers}<script src="${new URL(url, location)}"></script>`);
    this.inside.document.close();
  }

  postMessage(data) {
    this.loaded.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", {data})));
  }
};
