"""docs/explore.html in a real browser: its numbers are those of the code, and its controls change them.

  $ apt-get install chromium chromium-driver && pip install selenium
  $ SCREENSHOTS=runs/explore python -m pytest crosschecks/test_explore.py   # keeps pictures of the page there
"""
import base64
import functools
import gzip
import http.server
import io
import math
import os
import re
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm

import accountant
from ddpm import LINEAR

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "explore.html"
TEXT = PAGE.read_text()
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update --disable-dev-shm-usage")


def start_browser(profile):
    """Chromium, started by its driver. Without them the tests are skipped, or fail if CI is set."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    try:
        from selenium import webdriver
    except ImportError:
        missing.append("the package selenium")
    if missing:
        why = (f"missing: {', '.join(missing)}. Expected chromium and chromium-driver from apt-get, selenium "
               f"from pip")
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = start_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture
def page(chromium):
    """The page, opened from disk. After the test its console must be empty."""
    look(chromium)
    yield chromium
    assert chromium.get_log("browser") == []


def look(browser, width=1200, scheme="light", url=PAGE.as_uri()):
    """Load the page with a width in CSS pixels, in the light or the dark colour scheme."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = [dict(name="prefers-color-scheme", value=scheme)]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=media))
    browser.get(url)


def element(page, name):
    return page.find_element("id", name)


def numbers(page, figure):
    """The numbers that a figure states: {name: text}."""
    pairs = page.find_elements("css selector", f"#numbers-{figure} > div")
    return {p.find_element("tag name", "dt").text: p.find_element("tag name", "dd").text for p in pairs}


def number(page, figure, name):
    return float(re.match(r"[\d.,]+(e-?\d+)?", numbers(page, figure)[name]).group().replace(",", ""))


def type_number(page, name, value):
    from selenium.webdriver.common.keys import Keys
    element(page, f"{name}-number").send_keys(Keys.CONTROL, "a", Keys.NULL, str(value), Keys.ENTER)


def handle(page, label):
    return page.find_element("css selector", f'.handle[aria-label="{label}"]')


def press(page, target, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    page.execute_script("arguments[0].focus()", target)
    ActionChains(page).send_keys(*keys).perform()


def drag(page, target, x, y, kind="mouse"):
    """Drag a handle x pixels to the right and y pixels down, with a mouse or a finger."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput
    grip = target.find_element("css selector", ".grip")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", grip)
    box = page.execute_script("const b = arguments[0].getBoundingClientRect();"
                              "return [b.x + b.width / 2, b.y + b.height / 2]", grip)
    actions = ActionBuilder(page, mouse=PointerInput(kind, kind))
    actions.pointer_action.move_to_location(*map(round, box)).pointer_down()
    actions.pointer_action.move_to_location(round(box[0] + x), round(box[1] + y)).pointer_up()
    actions.perform()


# -----------------------------------------------------------------------------
# the page as a whole


def test_the_page_refers_to_nothing_but_links_and_itself():
    rest = re.sub(r'<a href="[^"]*"|(src|href)="data:[^"]*"', "", TEXT)
    assert not re.search(r"https?:|//\w|@import|url\(|fetch\(|XMLHttp|WebSocket|src=|href=", rest)
    for target in re.findall(r'<a href="(?!https)([^"]*)"', TEXT):
        assert (PAGE.parent / target).is_file(), target


def test_served_by_http_the_browser_asks_for_one_file(chromium):
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            asked.append(self.path)
    docs = functools.partial(Handler, directory=PAGE.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), docs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    look(chromium, url=f"http://127.0.0.1:{server.server_port}/explore.html")
    assert number(chromium, 3, "epsilon, at most") > 1
    server.shutdown()
    assert asked == ["/explore.html"] and chromium.get_log("browser") == []


@pytest.mark.parametrize("name, width, scheme", [("light", 1200, "light"), ("dark", 1200, "dark"),
                                                 ("phone", 390, "light"), ("phone-dark", 390, "dark")])
def test_nothing_overflows_and_each_scheme_has_its_own_colours(page, tmp_path, name, width, scheme):
    look(page, width, scheme)
    element(page, "add").click()
    page.execute_script("scrollTo(0, 0)")
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    shot = page.execute_cdp_cmd("Page.captureScreenshot", dict(captureBeyondViewport=True))
    (folder / f"explore-{name}.png").write_bytes(base64.b64decode(shot["data"]))
    wide = page.execute_script("return [...document.querySelectorAll('main, main *:not(svg *)')].filter("
                               "e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)")
    assert wide == [] and page.execute_script("return document.documentElement.scrollWidth") <= width
    style = page.execute_script("const s = getComputedStyle(document.body);"
                                "return [s.backgroundColor, s.color]")
    background, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style)
    assert background > ink + 500 if scheme == "light" else ink > background + 500


def test_every_input_has_a_label_and_every_handle_a_name_and_a_value(page):
    assert page.execute_script("return [...document.querySelectorAll('input')].filter("
                               "e => !e.labels.length && !e.ariaLabel).map(e => e.id)") == []
    handles = page.find_elements("css selector", ".handle")
    assert len(handles) == 15                            # 13 gradients, C and sigma
    assert all(h.get_attribute("aria-label") and h.get_attribute("aria-valuenow") for h in handles)


def test_every_slider_moves_a_number_by_keyboard_and_no_number_breaks_at_its_ends(page):
    from selenium.webdriver.common.keys import Keys
    sliders = page.find_elements("css selector", "input[type=range]")
    assert len(sliders) == 13
    for slider in sliders:
        name = slider.get_attribute("id")
        figure = slider.find_element("xpath", "../..").get_attribute("id")[-1]
        start, seen = page.execute_script(f"return v.{name}"), []
        for keys in (Keys.HOME, Keys.END, Keys.PAGE_DOWN * 3 + Keys.ARROW_LEFT * 9):
            slider.send_keys(keys)
            seen.append(numbers(page, figure))
            whole = page.find_element("tag name", "main").get_attribute("innerHTML")
            assert not re.search(r"NaN|undefined|Infinity|∞", whole), f"{name}: {seen[-1]}"
        assert seen[0] != seen[1] != seen[2], f"{name}: {seen}"
        type_number(page, name, start)
        assert page.execute_script(f"return v.{name}") == pytest.approx(start, rel=1e-9)


# -----------------------------------------------------------------------------
# 1. noise it


def test_the_two_images_are_the_repositorys(page):
    digit, cell = (base64.b64decode(re.search(rf'id="{name}".*?base64,([^"]*)"', TEXT).group(1))
                   for name in ("digit", "cell"))
    with zipfile.ZipFile(ROOT / "assets/cells/cells64.zip") as cells:
        assert cell == cells.read("test/eosinophil/14256.webp")
    with gzip.open(ROOT / "assets/mnist/t10k-images-idx3-ubyte.gz") as file:
        mnist = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    assert (np.array(Image.open(io.BytesIO(digit)).convert("L")) == mnist[1]).all()
    x0 = np.reshape(page.execute_script("return images[0].x0"), (28, 28, 4))
    assert np.abs(x0[..., 0] - (mnist[1] / 127.5 - 1)).max() < 1e-9


def test_alpha_bar_is_ddpms_and_x_t_is_signal_and_standard_normal_noise(page):
    alpha_bar = LINEAR.alpha_bar.double().numpy()
    assert np.allclose(page.execute_script("return alphaBar"), alpha_bar, rtol=1e-5, atol=0)
    noise = np.reshape(page.execute_script("return images[1].noise"), (-1, 4))[:, :3]
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.06        # red and green have noise of their own
    for t in (0, 300, 999):
        type_number(page, "t", t)
        assert number(page, 1, "signal: alpha_bar") == pytest.approx(alpha_bar[t], rel=1e-3)
        ratio = number(page, 1, "signal to noise: alpha_bar / (1 − alpha_bar)")
        assert ratio == pytest.approx(alpha_bar[t] / (1 - alpha_bar[t]), rel=1e-3)
        x0, noise, shown = page.execute_script("""const {x0, noise, canvas: c, context} = images[1];
            return [x0, noise, [...context.getImageData(0, 0, c.width, c.height).data]]""")
        x_t = math.sqrt(alpha_bar[t]) * np.array(x0) + math.sqrt(1 - alpha_bar[t]) * np.array(noise)
        colours = np.arange(len(x_t)) % 4 != 3
        assert np.abs(np.array(shown) - (127.5 * (x_t + 1)).clip(0, 255))[colours].max() <= 1


# -----------------------------------------------------------------------------
# 2. one private step


def moved(page):
    """How far the added image moves the sum, as the page states it."""
    said = element(page, "moved").text
    return float(re.search(r"moves the sum of the clipped gradients by ([\d.]+), which", said).group(1))


def test_a_gradient_is_dragged_by_mouse_by_finger_and_by_keys(page):
    from selenium.webdriver.common.keys import Keys
    gradient = handle(page, "Gradient 4: length")
    before = numbers(page, 2)["sum of the clipped arrows"], page.execute_script("return gradients[3]")
    for kind in ("mouse", "touch"):
        drag(page, gradient, -60, 40, kind)
        x, y = page.execute_script("return gradients[3]")
        assert x < before[1][0] - 0.5 and y < before[1][1] - 0.3, kind
        assert numbers(page, 2)["sum of the clipped arrows"] != before[0]
        before = numbers(page, 2)["sum of the clipped arrows"], [x, y]
    press(page, gradient, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert page.execute_script("return gradients[3]") == pytest.approx([x + 0.2, y + 0.1])


def test_C_and_sigma_have_handles_that_move_their_sliders(page):
    from selenium.webdriver.common.keys import Keys
    for label, name in (("Clipping norm C", "C"), ("Noise multiplier sigma", "sigma2")):
        start = page.execute_script(f"return v.{name}")
        drag(page, handle(page, label), 30, -20)
        dragged = page.execute_script(f"return v.{name}")
        assert dragged > start + 0.3
        press(page, handle(page, label), Keys.ARROW_LEFT, Keys.ARROW_DOWN)
        assert page.execute_script(f"return v.{name}") < dragged
        shown = element(page, f"{name}-number").get_attribute("value")
        assert float(shown) == page.execute_script(f"return v.{name}")
    C, sigma = page.execute_script("return [v.C, v.sigma2]")
    assert number(page, 2, "noise: sigma C") == pytest.approx(sigma * C, abs=0.006)


def test_an_added_image_moves_the_sum_by_C_at_most_and_draws_clipped_apart_by_K_C(page):
    element(page, "add").click()
    image = handle(page, "Added image's gradient: length")
    for C in (1, 0.5, 2):
        type_number(page, "C", C)
        for x, y in ((40, 0), (-150, -60), (10, 100)):
            drag(page, image, x, y)
            assert moved(page) <= C + 0.005
    page.execute_script("gradients[12] = [3, 3]")
    type_number(page, "C", 1)
    assert moved(page) == 1 and "counts as" not in element(page, "moved").text
    element(page, "apart").click()
    assert 3.9 < moved(page) <= 4                        # K = 4 draws, nearly parallel
    worth = float(re.search(r"counts as sigma = ([\d.]+)", element(page, "moved").text).group(1))
    assert worth == pytest.approx(0.6 / moved(page), abs=0.01)


def test_the_released_mean_is_the_noisy_sum_over_the_declared_B_and_the_button_draws_new_noise(page):
    def two(name):
        return np.array([float(x.replace("−", "-")) for x in re.findall(r"−?[\d.]+", numbers(page, 2)[name])])
    std, drawn = page.execute_script("return [v.sigma2 * v.C, drawn]")
    for button in ("add", "again"):
        wanted = (two("sum of the clipped arrows") + std * np.array(drawn)) / 12
        assert np.abs(two("released mean") - wanted).max() < 0.01
        element(page, button).click()
        drawn = page.execute_script("return drawn")
    assert drawn != [0.9, 0.8]


# -----------------------------------------------------------------------------
# 3. epsilon


def some_settings(n=50):
    """Settings (q, sigma, steps, delta): first those of the runs that ship, then log-uniform random ones."""
    r = np.random.default_rng(0)
    runs = [(1024 / 60000, 1.021, 64, 1e-5), (4096 / 60000, 0.818, 200, 1e-5), (0.04, 1.5, 2250, 1e-5),
            (512 / 60000, 0.4526, 110, 1e-5), (2048 / 14232, 5.553, 100, 1e-5)]
    low, high = np.log([1e-4, 0.3, 1, 1e-9]), np.log([0.99, 50, 1e5, 1e-3])
    more = np.exp(r.uniform(low, high, (n - len(runs), 4)))
    return runs + [(float(q), float(sigma), round(steps), float(delta)) for q, sigma, steps, delta in more]


def test_epsilon_in_the_browser_is_epsilon_in_short_in_50_settings(page):
    settings = some_settings()
    theirs = page.execute_script("return arguments[0].map(s => epsilonInShort(...s))", settings)
    assert len(theirs) == 50
    for setting, their in zip(settings, theirs):
        assert their == pytest.approx(accountant.epsilon_in_short(*setting), rel=1e-6), setting


def test_with_every_image_in_every_lot_epsilon_is_the_gaussians(page):
    orders = np.arange(2, 257)
    ours = accountant.to_epsilon(100 * accountant.rdp(1.0, 3.0, orders), orders, 1e-6)
    assert page.execute_script("return toEpsilon(rdp(1, 3), 100, 1e-6)") == pytest.approx(ours, rel=1e-9)


def test_the_sliders_numbers_are_the_accountants(page):
    for name, value in dict(N=50000, B=2048, T=150, sigma=2.1, delta=1e-6, wish=0.7).items():
        type_number(page, name, value)
    q = 2048 / 50000
    ours = accountant.epsilon_in_short(q, 2.1, 150, 1e-6)
    assert ours <= number(page, 3, "epsilon, at most") <= ours * 1.001
    needed = accountant.calibrate(0.7, 1e-6, q, 150, accountant.epsilon_in_short)
    assert number(page, 3, "sigma for the target epsilon") == pytest.approx(needed, rel=1e-3)
    element(page, "use-sigma").click()
    assert 0.699 < number(page, 3, "epsilon, at most") <= 0.7
    type_number(page, "B", 60000)                        # more than N: every image is in every lot
    assert numbers(page, 3)["q = B/N"] == "1"


def test_what_figure_3_says_of_the_runs_that_ship():
    start = (1024 / 60000, 1.021, 64, 1e-5)
    assert accountant.epsilon_in_short(*start) == pytest.approx(accountant.epsilon(*start)[0], rel=1e-4)
    default = (512 / 60000, 0.4526, 110, 1e-5)           # README.md: plan
    assert f"{accountant.epsilon_in_short(*default):.1f}" == "11.2"
    assert [f"{x:.3g}" for x in accountant.epsilon(*default)] == ["10", "2.27"]


# -----------------------------------------------------------------------------
# 4. what epsilon promises


@pytest.mark.parametrize("epsilon, delta", [(0.8, 1e-3), (10, 1e-5)])
def test_the_region_is_where_both_errors_of_all_tests_are_bounded_both_ways(page, epsilon, delta):
    """By the definition: P(E | in) <= e^epsilon P(E | out) + delta for E and not E, both ways round."""
    e = math.exp(epsilon)
    type_number(page, "epsilon4", epsilon)
    type_number(page, "delta4", delta)
    for f in (1e-6, 1e-3, 0.2, 0.31, 0.6, 0.9, 1):
        type_number(page, "alarms", f)
        h = np.linspace(0, 1, 200_001)
        fine = ((h <= e * f + delta) & (f <= e * h + delta)
                & (1 - h <= e * (1 - f) + delta) & (1 - f <= e * (1 - h) + delta))
        assert number(page, 4, "hits, at most") == pytest.approx(h[fine].max(), rel=1e-4, abs=6e-6), f
        assert number(page, 4, "hits, at least") == pytest.approx(h[fine].min(), rel=6e-3, abs=6e-6), f


def test_the_audits_dot_is_in_the_region_of_what_is_proven_and_outside_that_of_less(page):
    audit = page.execute_script("return AUDIT")
    proven = accountant.epsilon(1.0, 1.0, 1, audit["delta"])[0]
    assert proven <= audit["epsilon"] < proven + 0.01
    for share, mean in ((audit["hits"], 1), (audit["alarms"], 0)):       # of 2,000,000 scores, N(mean, 1)
        expected = norm.sf(4.542 - mean)                 # the event: the score is >= 4.542
        assert abs(share - expected) < 5 * math.sqrt(expected / 2e6)
    element(page, "audit").click()
    assert page.execute_script("return [v.epsilon4, v.delta4]") == [4.73, 1e-5]
    assert "inside" in element(page, "audit-says").text
    type_number(page, "epsilon4", 3.5)
    assert "outside" in element(page, "audit-says").text


def test_a_prior_of_one_half_becomes_what_the_readme_says(page):
    for epsilon, belief in ((1, 0.7311), (10, 0.99995)):
        type_number(page, "epsilon4", epsilon)
        assert number(page, 4, "belief after, at most") == pytest.approx(belief, abs=1e-4)
    element(page, "from-3").click()
    assert page.execute_script("return v.epsilon4") == number(page, 3, "epsilon, at most")
