"""The page of clusters in a real browser, as people use it: Chromium without a window."""

import csv
import json
import os
import shutil
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect, sync_playwright

from maect_jax import files
from maect_jax.evals import runner
from maect_jax.evals.assignment import Centres
from maect_jax.report import clusters
from tests.helpers import clustered as hand

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")
VIEWS = ("", "cluster/2", "borderline", "duplicates", "outliers", "find/png", "image/3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with a page."""
    folder = tmp_path_factory.mktemp("clustered")
    hand.write(folder, hand.make(folder))
    return folder


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers do not give.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def opened(browser, run, width=1280, scheme="light", before=""):
    """The page of a run in a window of its own, after the script `before`. Checks that it neither
    fails nor asks for anything that is not in the run's folder."""
    context = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme)
    context.set_default_timeout(5_000)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.on("request", lambda request: request.url.startswith("file:") or problems.append(request))
    page.add_init_script(before)
    page.goto((run / "clusters.html").as_uri())
    yield page
    context.close()
    assert not problems


def go(page, view):
    page.evaluate("view => { location.hash = `#/${view}`; }", view)
    page.wait_for_function("view => document.querySelector('#view').dataset.view === `#/${view}`",
                           arg=view)  # fmt: skip


def cards(page):
    """The names (or what stands for them) and counts of the clusters that are listed, in order."""
    return page.locator(".card").evaluate_all(
        "cards => cards.map(card => { const field = card.querySelector('input');"
        " return [field.value || field.placeholder, card.querySelector('.count').textContent]; })"
    )


def images(page):
    """The names of the images that are shown, in order."""
    return page.locator(".tile").evaluate_all("tiles => tiles.map(tile => tile.title)")


def downloaded(page, button):
    with page.expect_download() as waited:
        page.click(button)
    return waited.value


def name(page, cluster, text):
    field = page.get_by_label(f"Name of {cluster}", exact=True)
    field.fill(text)
    field.press("Enter")


def digest(run):
    return Centres.read(runner.read_clusters(run, hand.ROW)).digest


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_every_view_fits_and_shows_what_it_says(browser, run, scheme, width):
    with opened(browser, run, width, scheme) as page:
        for view in VIEWS:
            go(page, view)
            assert page.evaluate("document.documentElement.scrollWidth") == width, view
            assert page.locator(".picture").count(), view
            # Names are text, whatever is in them.
            assert not page.locator("#view b").count()
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, ground.strip("rgb()").split(", "))) / 3
        assert brightness > 200 if scheme == "light" else brightness < 60
        go(page, "")
        assert cards(page) == [
            [f"cluster {number}", f"{size} images"] for number, size in hand.SIZES.items()
        ]
        found, names = runner.read_clusters(run, hand.ROW), hand.NAMES
        go(page, "cluster/2")
        of_2 = [i for i in found["rank"].argsort(kind="stable") if found["clusters"][i] == 2]
        assert images(page) == [names[i] for i in of_2][: page.locator(".tile").count()]
        go(page, "borderline")
        assert images(page)[0] == names[found["margin"].argmin()]
        go(page, "duplicates")
        assert images(page) == ["2/00.png", "2/01.png"]
        assert page.locator(".caption").all_text_contents() == ["copy 00.png", "copy 01.png"]
        go(page, "outliers")
        assert images(page) == ["2/39.png"]
        go(page, "find/QUOTES")
        assert images(page) == ["3/quotes \"' and, commas.png"]
        assert page.locator(".caption").text_content() == "quotes \"' and, commas.png"
        page.locator(".tile").dblclick()
        expect(page.locator("h2").first).to_have_text("3/quotes \"' and, commas.png")
        page.go_back()
        page.locator(".tile").click()
        clear, bar = (page.locator(x).bounding_box() for x in ("#clear", "#chosen"))
        assert clear["x"] + clear["width"] < bar["x"] + bar["width"] < width
        assert bar["height"] < 1.5 * clear["height"]  # in one line
        page.click("#closer")
        expect(page.locator("h2").first).to_have_text("3/quotes \"' and, commas.png")
        expect(page.locator(".tile")).to_have_count(10)
        # The picture itself, of 28 pixels, is in the place of its thumbnail.
        assert page.wait_for_function("document.querySelector('.closer img')?.naturalWidth === 28")
        page.get_by_role("link", name="cluster 3", exact=True).click()
        expect(page.locator(".tile")).to_have_count(len(hand.ODD))
        assert sorted(images(page)) == sorted(hand.ODD)
        page.locator(".chip").first.click()
        assert page.evaluate("location.hash") != "#/cluster/3"
        page.go_back()
        expect(page.get_by_label("Name of cluster 3")).to_be_visible()
        page.get_by_label("Name of cluster 3").fill(200 * "W")
        page.keyboard.press("Enter")
        for view in ("", "cluster/3", "cluster/2", "find/3%2F", "image/3"):
            go(page, view)
            assert page.evaluate("document.documentElement.scrollWidth") == width, view
        page.click("text=Move to ...")
        assert page.evaluate("(list => list.scrollWidth - list.clientWidth)"
                             "(document.querySelector('.choices'))") == 0  # fmt: skip
        page.click("text=Cancel")
        expect(page.locator("#dialog")).to_be_hidden()
        go(page, "")
        assert page.locator("#summary").text_content().endswith("1 of them with a name.")


def test_names_are_kept_saved_and_loaded(browser, run, tmp_path):
    odd = hand.ODD[-1]
    with opened(browser, run) as page:
        expect(page.locator("#undo")).to_be_disabled()
        page.click("#save-labels")  # of nothing: there is no download
        expect(page.locator("#status span")).to_contain_text("would be empty")
        name(page, "cluster 2", ' disk,"round" ')
        name(page, "cluster 7", "leaf")
        name(page, "cluster 0", "leaf")  # which merges both
        assert cards(page)[1:] == [["leaf", "21 images in 2"], ["cluster 3", "5 images"]]
        assert "save names.json" not in page.locator("#status").text_content()
        page.locator("#status").get_by_role("button", name="Undo").click()
        assert cards(page)[1] == ["cluster 0", "12 images"]
        go(page, "cluster/0")
        page.click("text=Merge with")
        page.fill("#dialog-input", "LEA")
        page.locator(".choices button").click()
        expect(page.locator(".title .count")).to_have_text("21 images")
        go(page, "cluster/3")
        for image in (odd, "3/__proto__.png"):
            page.locator(".tile").nth(images(page).index(image)).click()
        expect(page.locator("#closer")).to_be_hidden()
        page.click("#move")
        page.locator(".choices button", has_text="leaf").click()
        expect(page.locator(".tile")).to_have_count(3)
        page.locator(".tile").nth(0).click()
        first = images(page)[0]
        page.click("#move")
        page.fill("#dialog-input", "new")
        page.keyboard.press("Enter")
        expect(page.locator(".tile")).to_have_count(2)
        page.locator(".tile").nth(0).click()
        page.click("#clear")
        expect(page.locator("#chosen")).to_be_hidden()
        go(page, "")
        assert cards(page) == [
            ['disk,"round"', "40 images"], ["leaf", "23 images in 2"], ["cluster 3", "2 images"],
            ["new", "1 image"],
        ]  # fmt: skip
        page.get_by_label("Images of new").click()
        expect(page.locator(".tile")).to_have_count(1)
        assert images(page) == [first]
        go(page, "")
        before = cards(page)
        page.reload()
        assert cards(page) == before
        saved = downloaded(page, "#save-names")
        assert saved.suggested_filename == "names.json"
        saved.save_as(tmp_path / "names.json")
        named = files.read_json(tmp_path / "names.json")
        moved = {odd: "leaf", "3/__proto__.png": "leaf", first: "new"}
        assert named == {
            "clustering": digest(run), "names": {"0": "leaf", "2": 'disk,"round"', "7": "leaf"},
            "images": moved,
        }  # fmt: skip
        saved = downloaded(page, "#save-labels")
        saved.save_as(tmp_path / saved.suggested_filename)
        with (tmp_path / "labels.csv").open(errors="surrogateescape", newline="") as file:
            header, *lines = csv.reader(file)
        of_cluster = {"0": "leaf", "2": 'disk,"round"', "7": "leaf"}
        labels = {image: moved.get(image, of_cluster.get(image[0])) for image in hand.NAMES}
        assert header == ["image", "label"]
        assert lines == [[image, label] for image, label in labels.items() if label]
        page.click("#reset")
        assert cards(page)[1] == ["cluster 0", "12 images"]
        others = {"names.json": named | {"clustering": "0" * 16}, "text": "{", "list": [1]}
        for key, content in others.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"other_{key}").write_text(text)
            page.set_input_files("#file", tmp_path / f"other_{key}")
            expect(page.locator("#status span")).to_contain_text("Nothing is changed.")
            expect(page.locator("#status span")).to_contain_text(f"other_{key}")
        with page.expect_file_chooser() as chooser:
            page.click("#load-names")
        chooser.value.set_files(tmp_path / "names.json")
        expect(page.locator("#status span")).to_contain_text("The names are those of names.json.")
        assert cards(page) == before
        page.keyboard.press("Control+z")
        assert cards(page)[1] == ["cluster 0", "12 images"]
        page.set_input_files("#file", tmp_path / "names.json")
        expect(page.locator("#status span")).to_contain_text("The names are those of names.json.")
        numbered = named | {"names": {"0": "cluster 0", "7": "leaf"}, "images": {}}
        (tmp_path / "numbered.json").write_text(json.dumps(numbered))
        page.set_input_files("#file", tmp_path / "numbered.json")
        downloaded(page, "#save-labels")
        expect(page.locator("#status span")).to_contain_text("no names yet: cluster 0.")
        page.keyboard.press("Control+z")
        # A reader may leave out spaces before what is not in quotes.
        page.evaluate("names => names.forEach((name, i) => { names[i] = ` ${name}`; })",
                      page.evaluate_handle("window.maectClusters.names"))  # fmt: skip
        text = downloaded(page, "#save-labels").path().read_bytes()
        assert b'\n" 7/00.png",leaf\n' in text
        # Another run's page starts without them, and takes none away.
        shutil.copytree(run, tmp_path / "other")
        text = (tmp_path / "other/clusters/data.js").read_text().replace(digest(run), "1" * 16)
        (tmp_path / "other/clusters/data.js").write_text(text)
        page.goto((tmp_path / "other/clusters.html").as_uri())
        name(page, "cluster 0", "other")
        page.goto((run / "clusters.html").as_uri())
        assert cards(page) == before


def test_the_names_of_the_run_are_there_from_the_start(browser, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    given = {"clustering": digest(run), "names": {"7": "leaf"}, "images": {"2/05.png": "leaf"}}
    with (tmp_path / "run/clusters/data.js").open("a") as file:
        file.write(f"window.maectClusters.saved = {json.dumps(given)};")
    with opened(browser, tmp_path / "run") as page:
        assert cards(page)[2] == ["leaf", "10 images"]
        expect(page.locator("#reset")).to_be_disabled()
        name(page, "leaf", "tree")
        go(page, "image/0")
        go(page, "find/2%2F05")
        assert page.locator(".tile").get_attribute("aria-label") == "2/05.png, tree, moved"
        go(page, "")
        page.click("#reset")
        assert cards(page)[2] == ["leaf", "10 images"]


def test_it_is_used_by_keyboard(browser, run):
    with opened(browser, run) as page:
        focused = "document.activeElement"
        page.focus("#save-names")
        for text in ("Save labels.csv", "Load names.json", "Clusters", "Borderline 7"):
            page.keyboard.press("Tab")
            assert page.evaluate(f"{focused}.textContent") == text
        assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
        page.get_by_label("Images of cluster 2").focus()
        page.keyboard.press("Enter")
        page.wait_for_selector(".tile")
        page.focus(".chip:last-child")
        page.keyboard.press("Tab")
        tiles = images(page)
        across = page.evaluate(
            "[...document.querySelectorAll('.tile')].findIndex((tile, _, [first]) =>"
            " tile.getBoundingClientRect().top > first.getBoundingClientRect().top)"
        )
        for key, index in (("ArrowRight", 1), ("ArrowDown", 1 + across), ("ArrowLeft", across),
                           ("ArrowUp", 0), ("End", 39), ("Home", 0)):  # fmt: skip
            page.keyboard.press(key)
            assert page.evaluate(f"Number({focused}.dataset.index)") == index
        assert page.locator(".tile[tabindex='0']").count() == 1
        page.keyboard.press("Space")
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Shift+ArrowRight")
        chosen = page.locator(".tile[aria-selected=true]")
        assert chosen.evaluate_all("tiles => tiles.map(tile => tile.title)") == tiles[:3]
        assert page.locator("#chosen .count").text_content() == "3 images"
        page.keyboard.press("Escape")
        assert not chosen.count()
        page.keyboard.press("Enter")
        expect(page.locator("h2").first).to_have_text(tiles[2])
        assert page.evaluate(f"{focused}.id") == "view"
        label = page.locator(".tile").first.get_attribute("aria-label")
        assert "cluster 2" in label


def test_clusters_are_read_at_fewer_groups(browser, run, tmp_path):
    with opened(browser, run) as page:
        page.focus("#level")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert page.locator("output").text_content() == "2 groups"
        assert len(cards(page)) == 2
        title, _ = cards(page)[0]
        name(page, title, "both")
        page.keyboard.press("End")
        page.locator("#level").press("End")
        named = int(page.locator("#summary").text_content().split(", ")[-1].split(" ")[0])
        assert len(cards(page)) == 4 - named + 1
    # Without the neighbours, and where there is nothing to join, the page has what is left.
    copy = shutil.copytree(run, tmp_path / "run")
    with (copy / "clusters" / "data.js").open("a") as file:
        file.write("Object.assign(window.maectClusters, { near: null, merges: [] });")
    with opened(browser, copy) as page:
        assert page.locator(".tabs a").all_text_contents() == ["Clusters", "Borderline 7", "Find"]
        assert not page.locator("#level").count()
        go(page, "image/3")
        assert page.locator(".closer dd").first.text_content()


def test_a_browser_that_keeps_nothing_says_so(browser, run):
    private = "Storage.prototype.setItem = () => { throw new Error('full'); };"
    with opened(browser, run, before=private) as page:
        name(page, "cluster 2", "disk")
        expect(page.locator("#status span")).to_contain_text("save names.json")
        assert cards(page)[0] == ["disk", "40 images"]
    denied = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }});"
    with opened(browser, run, before=denied) as page:
        name(page, "cluster 2", "disk")
        assert cards(page)[0] == ["disk", "40 images"]


def test_a_part_of_very_many_images(browser, run, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "_MOST", 30)
    monkeypatch.setattr(clusters, "_CENTRAL", 2)
    monkeypatch.setattr(clusters, "_LISTED", 3)
    source = hand.make(tmp_path)
    hand.write(tmp_path, source)
    with opened(browser, tmp_path) as page:
        name(page, "cluster 2", "disk")
        assert cards(page)[0] == ["disk", "40 images"]
        saved = downloaded(page, "#save-labels")
        text = saved.path().read_bytes()
        assert text.count(b",disk\n") == 40
        os.remove(tmp_path / "clusters" / "all.js")


def test_only_what_is_near_the_window_is_in_the_document(browser, run):
    with opened(browser, run, width=390) as page:
        page.set_viewport_size(dict(width=390, height=300))
        go(page, "find/")
        assert len(images(page)) < len(hand.NAMES)
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_function("document.querySelector('.tile:last-child').title[0] === '3'")
        assert len(images(page)) < len(hand.NAMES)
        assert set(images(page)[-len(hand.ODD) :]) == set(hand.ODD)  # the smallest cluster is last
