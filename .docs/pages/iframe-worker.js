// Browsers start no workers from files: where the site is read from its folder, the search runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const { contentWindow: inside, contentDocument: page } = this.frame;
      inside.postMessage = (message) => {
        const data = structuredClone(message);
        setTimeout(() => this.onmessage?.(new MessageEvent("message", { data })));
      };
      const script = page.createElement("script");
      script.src = url;
      script.onload = () => {
        const waiting = this.waiting;
        this.waiting = null;
        waiting.forEach((message) => this.postMessage(message));
      };
      page.body.append(script);
    }
    postMessage(message) {
      if (this.waiting) return void this.waiting.push(message);
      const { contentWindow: inside } = this.frame;
      const data = inside.structuredClone(message);
      setTimeout(() => inside.onmessage?.(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
