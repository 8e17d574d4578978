"""What a report holds."""

import html
import re
from html.parser import HTMLParser


class Report(HTMLParser):
    """Tags, ids, table cells, the text, and everything that a browser would fetch."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.ids, self.links, self.cells, self.open = [], [], [], [], []
        self.feed(source)
        without_figures = re.sub(r"<(svg|style).*?</\1>", "", source, flags=re.DOTALL)
        self.text = " ".join(html.unescape(re.sub(r"<.*?>", "", without_figures)).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "srcset", "data"):
                self.links.append(value)
        if tag in ("td", "th"):
            self.cells.append("")
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data
