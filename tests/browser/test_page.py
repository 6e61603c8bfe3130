"""The page does what a person asks of it: with the demo model where answers matter, with a script where moments do."""

import base64
import json
import re
import threading
from types import SimpleNamespace

import pytest

from memphi.errors import DoesNotFitError, WorkerError
from memphi.request import Delta, FinishReason
from memphi.server.app import make_app
from memphi.server.settings import ServerSettings
from tests.browser.scripted import Script, scripted
from tests.browser.steps import MEDIA, ask, attach, wait_for_answer
from tests.server.conftest import listening, sample
from tests.server.fakes import said

NARROW = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
DROP = """async ([names, contents]) => {
    const transfer = new DataTransfer();
    names.forEach((name, index) => {
        const bytes = Uint8Array.from(atob(contents[index]), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name));
    });
    for (const type of ["dragover", "drop"]) {
        document.body.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    }
}"""
HITS = (
    '<img src=x onerror="window.hit=1">',
    "<script>window.hit=1</script>",
    "<svg onload=window.hit=1><style>*{display:none}</style>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "[press](javascript:window.hit=1)",
    "[press](jAva\tscript:window.hit=1) [or](data:text/html,<script>parent.hit=1</script>)",
    "![picture](https://elsewhere.example/p.png)",
    '```"><img src=x onerror=window.hit=1>\ncode\n```',
    "<a href=javascript:window.hit=1>press</a><form action=//elsewhere.example><button>press</button></form>",
)
"""Answers that would do harm in a page that believed them."""


HELD_MICROPHONE = """{
    const get = MediaDevices.prototype.getUserMedia, Recorder = MediaRecorder;
    MediaDevices.prototype.getUserMedia = async function (...all) {
        return (window.microphone = await get.apply(this, all));
    };
    window.MediaRecorder = class extends Recorder {
        constructor(...all) { super(...all); window.recorder = this; }
    };
}"""
BLOCKED = """for (const name of ["localStorage", "sessionStorage", "indexedDB"]) {
    Object.defineProperty(window, name, { get() { throw new DOMException("", "SecurityError"); } });
}"""


def kept(page):
    """The conversations in the browser's store."""
    return page.evaluate(
        """() => new Promise((resolve) => {
            const request = indexedDB.open("memphi", 1);
            request.onsuccess = () => {
                const all = request.result.transaction("conversations").objectStore("conversations").getAll();
                all.onsuccess = () => resolve(all.result);
            };
        })"""
    )


def test_a_picture_is_priced_sent_and_answered(visit, demo):
    page = visit(demo)
    attach(page, "red-circle.png")
    page.wait_for_selector(".chip .tokens >> text=41 tokens")
    page.fill("#text", "What is in the picture?")
    page.wait_for_selector("#price >> text=67 tokens")
    page.click("#send")
    assert wait_for_answer(page) == "red circle"
    assert page.inner_text(".facts").startswith("67 → 11 tokens")
    assert page.locator(".asked img").evaluate("image => image.naturalWidth") > 0
    assert page.inner_text("#conversations") == "Today\nWhat is in the picture?"


def test_the_price_is_that_of_the_answer(visit, demo):
    """Attachments and text are priced apart, and only once; together they are what the model then reads."""
    page = visit(demo)
    ask(page, "What is in the picture?", "red-circle.png")
    wait_for_answer(page)
    attach(page, "green-triangle.png", "words.wav", "shapes.png")
    page.fill("#text", "And what is here, then?")
    page.wait_for_selector("#price >> text=token")
    price = re.match(r"[\d,]+", page.inner_text("#price"))[0]
    page.press("#text", "Enter")
    wait_for_answer(page)
    assert page.locator(".facts").last.inner_text().startswith(f"{price} → ")


def test_a_recording_is_heard(visit, demo):
    page = visit(demo, permissions=["microphone"])
    page.click("#record")
    page.wait_for_selector("#recording >> text=0:03")
    assert page.locator("#text").is_hidden()
    page.click("#recording-done")
    page.wait_for_selector(".chip .tokens >> text=tokens")
    assert page.inner_text(".chip .length") in ("0:03", "0:04")
    page.fill("#text", "Transcribe the audio.")
    page.click("#send")
    heard = set(wait_for_answer(page).split())
    assert len(heard & {"nine", "yellow", "circle", "go"}) >= 2
    [message, _] = kept(page)[0]["messages"]
    assert message["attachments"][0]["type"] == "audio/wav"


def test_a_recording_is_discarded_with_escape(visit, server):
    page = visit(server[0], permissions=["microphone"])
    page.click("#record")
    page.wait_for_selector("#meter i")
    page.keyboard.press("Escape")
    page.wait_for_selector("#recording", state="hidden")
    assert page.locator(".chip").count() == 0
    assert page.evaluate("document.activeElement.id") == "text"


def test_no_microphone_is_said(visit, server):
    page = visit(server[0], permissions=[])
    page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', 'NotAllowedError')); }"
    )
    page.click("#record")
    page.wait_for_selector("#problem >> text=allow it for this page")


def test_a_microphone_that_cannot_be_recorded_is_let_go(visit, server):
    page = visit(server[0], script=HELD_MICROPHONE, permissions=["microphone"])
    page.evaluate("() => { window.AudioContext = class { constructor() { throw new Error('there is no sound'); } }; }")
    page.click("#record")
    page.wait_for_selector("#problem >> text=The microphone does not work: there is no sound.")
    assert page.evaluate("window.microphone.getTracks().map((track) => track.readyState)") == ["ended"]
    assert page.is_hidden("#recording")


def test_a_microphone_that_is_unplugged_leaves_what_it_heard(visit, server):
    page = visit(server[0], script=HELD_MICROPHONE, permissions=["microphone"])
    page.click("#record")
    page.wait_for_selector("#recording >> text=0:01")
    page.evaluate("() => window.microphone.getTracks().forEach((track) => track.stop())")
    page.wait_for_function("() => window.recorder.state === 'inactive'")
    page.click("#recording-done")
    page.wait_for_selector(".chip .tokens >> text=tokens")


def test_nothing_is_sent_before_all_files_are_read(visit, server):
    page = visit(server[0])
    page.evaluate("""() => {
        const read = Blob.prototype.arrayBuffer, held = new Promise((resolve) => (window.goOn = resolve));
        Blob.prototype.arrayBuffer = function () { return held.then(() => read.call(this)); };
    }""")
    page.set_input_files("#picker", MEDIA / "red-circle.png")
    ask(page, "What is it?")
    assert page.input_value("#text") == "What is it?"
    assert page.is_disabled("#send")
    page.evaluate("() => window.goOn()")
    page.wait_for_selector("#send:enabled")
    page.press("#text", "Enter")
    wait_for_answer(page)
    assert [media.kind for media in server[1].last.media] == ["image"]


@pytest.mark.parametrize("composing", ["isComposing: true", "keyCode: 229"])
def test_the_enter_of_an_input_method_sends_nothing(visit, server, composing):
    page = visit(server[0])
    page.fill("#text", "にほん")
    page.evaluate(f"""() => {{
        const enter = {{key: "Enter", bubbles: true, cancelable: true, {composing}}};
        document.querySelector("#text").dispatchEvent(new KeyboardEvent("keydown", enter));
    }}""")
    assert page.input_value("#text") == "にほん"


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_files_are_dropped_and_pasted(visit, server, how):
    names = ["red-circle.png", "words.wav", "shapes.png"]
    page = visit(server[0])
    script = (
        DROP
        if how == "drop"
        else DROP.replace('["dragover", "drop"]', '["paste"]').replace(
            "new DragEvent(type, {dataTransfer:", "new ClipboardEvent(type, {clipboardData:"
        )
    )
    page.evaluate(script, [names, [base64.b64encode(sample(name)).decode() for name in names]])
    page.wait_for_function("() => document.querySelectorAll('.chip .tokens:not(.pending)').length === 3")
    page.click("[aria-label='Remove red-circle.png']")
    page.press("#text", "Enter")
    assert wait_for_answer(page) == "It is a fake."
    assert [media.kind for media in server[1].last.media] == ["audio", "image"]
    assert server[1].last.media[1].content == sample("shapes.png")


def test_an_answer_is_shown_as_it_grows(visit, server):
    address, script = server
    script.answer = said("**Slowly** but surely.", pieces=3)
    script.go_on.clear()
    page = visit(address)
    ask(page, "Go")
    page.wait_for_selector(".answer[aria-busy=true] .prose >> text=Slow")
    assert "surely" not in page.inner_text(".answer")
    script.go_on.set()
    assert wait_for_answer(page) == "Slowly but surely."
    assert page.inner_html(".answer .prose strong") == "Slowly"
    assert page.get_attribute(".answer", "aria-busy") == "false"


@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_is_stopped(visit, server, how):
    address, script = server
    script.answer = None
    page = visit(address)
    ask(page, "Talk")
    page.wait_for_selector(".prose >> text=word3")
    page.click("#stop") if how == "button" else page.keyboard.press("Escape")
    assert wait_for_answer(page).startswith("word0 word1")
    assert script.left.wait(timeout=5), "the engine goes on"
    assert page.is_visible(".note >> text=Stopped.")
    script.answer = said("Again.")
    page.click("[aria-label='Answer again']")
    assert wait_for_answer(page) == "Again."
    assert page.locator(".answer").count() == 1


def test_conversations_stay(visit, server):
    address, script = server
    script.answer = said("First answer.")
    page = visit(address)
    ask(page, "First question", "red-circle.png")
    wait_for_answer(page)
    page.click("#new")
    script.answer = said("Second answer.")
    ask(page, "Second question")
    wait_for_answer(page)
    page.reload()
    page.wait_for_selector(".prose >> text=Second answer.")
    page.click("#conversations >> text=First question")
    page.wait_for_selector(".prose >> text=First answer.")
    assert page.locator(".asked img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    page.fill("#title", "A circle")
    page.press("#title", "Enter")
    page.wait_for_selector("#conversations >> text=A circle")
    page.reload()
    # A function: an expression would have to be evaluated in the page, which its policy forbids.
    page.wait_for_function("() => document.getElementById('title').value === 'A circle'")
    page.click("#delete")
    page.click("#confirm-yes")
    page.wait_for_selector(".empty")
    assert [one["title"] for one in kept(page)] == ["Second question"]


def test_attachments_are_kept_once_there_is_room_for_them(visit, server):
    page = visit(server[0])
    page.evaluate("""() => {
        const put = IDBObjectStore.prototype.put;
        window.full = true;
        IDBObjectStore.prototype.put = function (value) {
            const request = put.call(this, value);
            if (window.full) request.onsuccess = () => this.transaction.abort();
            return request;
        };
    }""")
    ask(page, "One", "red-circle.png")
    wait_for_answer(page)
    page.wait_for_selector("#unkept:not([hidden])", state="attached")
    assert kept(page) == []
    page.evaluate("() => { window.full = false; }")
    ask(page, "Two")
    wait_for_answer(page, 1)
    page.reload()
    page.wait_for_selector(".prose >> nth=1")
    assert page.locator(".asked img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


def test_a_conversation_whose_attachments_are_lost_goes_on_without(visit, server):
    address, script = server
    page = visit(address)
    ask(page, "One", "red-circle.png")
    wait_for_answer(page)
    page.evaluate("""() => new Promise((resolve) => {
        const request = indexedDB.open("memphi", 1);
        request.onsuccess = () => {
            const transaction = request.result.transaction("blobs", "readwrite");
            transaction.objectStore("blobs").clear();
            transaction.oncomplete = resolve;
        };
    })""")
    page.reload()
    page.wait_for_selector(".asked >> text=red-circle.png is missing")
    ask(page, "Two")
    assert wait_for_answer(page, 1) == "It is a fake."
    assert [message.content for message in script.last.messages][::2] == [("One",), ("Two",)]


def test_another_tab_goes_on_where_this_one_was(visit, server):
    page = visit(server[0])
    ask(page, "One")
    wait_for_answer(page)
    other = page.context.new_page()
    other.goto(page.url)
    ask(other, "Two")
    wait_for_answer(other, 1)
    page.evaluate("() => dispatchEvent(new Event('focus'))")
    page.wait_for_selector(".asked >> text=Two")
    ask(page, "Three")
    wait_for_answer(page, 2)
    asked = [message.content for message in server[1].last.messages if message.role == "user"]
    assert asked == [("One",), ("Two",), ("Three",)]


def test_a_browser_that_keeps_nothing(visit):
    with scripted(api_keys=("open-sesame",)) as (address, _):
        page = visit(address, expected=["401"], script=BLOCKED)
        page.fill("[name=key]", "open-sesame")
        page.click("text=Use this key")
        page.wait_for_selector("body[data-server=ready]")
        assert page.is_visible("#unkept")
        page.click("#settings-open")
        page.click(".choice >> text=Dark")
        page.keyboard.press("Escape")
        ask(page, "One")
        assert wait_for_answer(page) == "It is a fake."


def test_a_follow_up_carries_what_went_before(visit, server):
    address, script = server
    page = visit(address)
    ask(page, "One", "red-circle.png")
    wait_for_answer(page)
    page.reload()
    page.wait_for_selector(".prose")
    ask(page, "Two")
    wait_for_answer(page, 1)
    assert [message.role for message in script.last.messages] == ["user", "assistant", "user"]
    assert script.last.messages[0].content[0].content == sample("red-circle.png")
    assert script.last.messages[1].content == ("It is a fake.",)


def test_a_conversation_is_saved_as_the_api_takes_it(visit, server):
    address, script = server
    page = visit(address)
    ask(page, "One", "red-circle.png", "words.wav")
    wait_for_answer(page)
    with page.expect_download() as download:
        page.click("#export")
    assert download.value.suggested_filename == "One.json"
    saved = json.loads(download.value.path().read_text())
    answer = page.request.post(
        f"{address}/v1/chat/completions", data={"model": saved["model"], "messages": saved["messages"][:1]}
    )
    assert answer.ok, answer.text()
    assert [media.kind for media in script.last.media] == ["image", "audio"]
    assert saved["messages"][1] == {"role": "assistant", "content": "It is a fake."}


def test_settings_are_sent(visit, server):
    address, script = server
    page = visit(address)
    page.click("#settings-open")
    page.fill("[name=system]", "Be brief.")
    page.fill("[name=temperature]", "0.7")
    page.fill("[name=topP]", "0.9")
    page.fill("[name=maxTokens]", "12")
    page.fill("[name=seed]", "5")
    page.select_option("[name=detail]", "4")
    page.select_option("[name=onPressure]", "shrink-images")
    page.keyboard.press("Escape")
    ask(page, "One", "red-circle.png")
    wait_for_answer(page)
    request, sampling = script.last, script.last.sampling
    assert (request.messages[0].role, request.messages[0].content) == ("system", ("Be brief.",))
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0.7, 0.9, 12, 5)
    assert (request.on_pressure, request.media[0].detail) == ("shrink-images", 4)


def test_what_was_degraded_is_shown(visit, server):
    address, script = server
    degraded = ("image 1 was seen with 4 of 16 crops",)
    script.answer = [Delta("A cat", (1,)), Delta("", (), FinishReason.LENGTH, degraded)]
    page = visit(address)
    ask(page, "What is it?")
    wait_for_answer(page)
    assert page.locator(".note.degraded li").all_inner_texts() == ["Image 1 was seen with 4 of 16 crops."]
    assert page.is_visible(".note >> text=cut here")


def test_an_answer_cannot_act(visit, server):
    address, script = server
    page = visit(address)
    for number, hit in enumerate(HITS):
        script.answer = said(f"Before\n\n{hit}\n\nAfter *all*")
        ask(page, hit)
        assert wait_for_answer(page).startswith("Before")
        assert page.locator(".bubble").last.text_content() == hit
        assert page.locator(".prose em").count() == number + 1, f"what stands after {hit} is gone"
    page.reload()
    page.wait_for_selector(f".answer >> nth={len(HITS) - 1}")
    for link in page.locator(".prose a").all():
        link.click(no_wait_after=True)
    assert (
        page.locator(".prose :is(img, script, style, iframe, form, svg:not(.icon), a[href^=j], a[href^=d])").count()
        == 0
    )
    assert page.evaluate("window.hit") is None
    assert "<img src=x onerror" in page.locator(".prose").first.inner_text()


def test_the_key_is_asked_for(visit):
    with scripted(api_keys=("open-sesame",)) as (address, _):
        page = visit(address, expected=["401"])
        page.fill("[name=key]", "wrong")
        page.click("text=Use this key")
        page.wait_for_selector("#key-reason >> text=refused this key")
        page.fill("[name=key]", "open-sesame")
        page.click("text=Use this key")
        page.wait_for_selector("body[data-server=ready]")
        ask(page, "One", "red-circle.png")
        assert wait_for_answer(page) == "It is a fake."
        page.reload()
        page.wait_for_selector("body[data-server=ready]")
        assert page.evaluate("localStorage.getItem('memphi.key')") is None
        page.click("#settings-open")
        page.click("#key-forget")
        page.check("[name=remember]")
        page.fill("[name=key]", "open-sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-server=ready]")
        assert page.evaluate("[sessionStorage.length, localStorage.getItem('memphi.key')]") == [0, "open-sesame"]


def test_what_can_be_no_key_is_not_taken(visit):
    with scripted(api_keys=("open-sesame",)) as (address, _):
        page = visit(address, expected=["401"])
        page.fill("[name=key]", "öffne dich")
        page.click("text=Use this key")
        assert page.is_visible("#key-dialog")
        assert page.evaluate("sessionStorage.length") == 0
        page.fill("[name=key]", " open-sesame ")
        page.click("text=Use this key")
        page.wait_for_selector("body[data-server=ready]")


def test_who_has_no_key_may_look_and_is_asked_again(visit):
    with scripted(api_keys=("open-sesame",)) as (address, _):
        page = visit(address, expected=["401"])
        page.click("text=Not now")
        assert page.is_visible("#unlock")
        ask(page, "One")
        page.fill("[name=key]", "open-sesame")
        page.keyboard.press("Enter")
        assert wait_for_answer(page) == "It is a fake."
        page.wait_for_selector("body[data-server=ready]")


def test_a_refusal_is_one_sentence_and_can_be_tried_again(visit, server):
    address, script = server
    script.answer = [DoesNotFitError("the request needs 9 GiB and 4 GiB are there; send fewer pictures")]
    page = visit(address, expected=["413"])
    ask(page, "One")
    page.wait_for_selector(".note.failed >> text=The request needs 9 GiB and 4 GiB are there; send fewer pictures.")
    script.answer = said("Now.")
    page.click("text=Try again")
    assert wait_for_answer(page) == "Now."


def test_files_that_cannot_be_used_are_refused_before_they_are_sent(visit, server, tmp_path):
    page = visit(server[0], expected=["400"])
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "broken.png").write_bytes(sample("shapes.png")[:40])
    page.set_input_files("#picker", tmp_path / "notes.pdf")
    page.wait_for_selector("#problem >> text=notes.pdf is neither a picture nor a recording")
    page.set_input_files("#picker", tmp_path / "broken.png")
    page.wait_for_selector("#problem >> text=broken.png")
    assert page.is_disabled("#send")
    page.click("[aria-label='Remove broken.png']")
    assert page.is_hidden("#problem")


def test_a_server_that_loads_is_waited_for(visit, monkeypatch):
    monkeypatch.setattr("memphi.server.errors.RETRY_SECONDS", 1)
    script, loaded = Script(), threading.Event()

    def load(progress):
        progress(43, 100)
        loaded.wait(timeout=20)
        return script.engine

    with listening(make_app(load, ServerSettings("scripted"))) as address:
        page = visit(address, expected=["503"])
        page.wait_for_selector("#server-state >> text=The model is being loaded… 43 %")
        ask(page, "One")
        page.wait_for_selector(".waiting >> text=trying again by itself")
        loaded.set()
        page.wait_for_selector("body[data-server=ready]")
        assert wait_for_answer(page) == "It is a fake."


def test_a_server_that_fails_in_words_of_no_api_is_asked_again(visit, server):
    page = visit(server[0], expected=["503"])
    page.wait_for_selector("body[data-server=ready]")
    for path in ("memory", "health"):
        page.route(f"**/{path}", lambda route: route.fulfill(status=503, body="<h1>No server</h1>"))
    page.wait_for_selector("body[data-server=away]")
    page.unroute_all()
    page.wait_for_selector("body[data-server=ready]")


def test_who_has_stopped_waiting_does_not_wait(visit, server):
    page = visit(server[0])
    state = page.evaluate("""async () => {
        const [{ answer, emptyAnswer }, { Failure }] = await Promise.all(
            ["/page/chat.js", "/page/server.js"].map((path) => import(path)));
        const controller = new AbortController(), message = emptyAnswer();
        const makeBody = async () => {
            controller.abort();
            throw new Failure("Not yet.", { status: 503, retrySeconds: 600 });
        };
        const ended = answer(null, makeBody, message, controller.signal, () => {});
        await Promise.race([ended, new Promise((resolve) => setTimeout(resolve, 10_000))]);
        return message.state;
    }""")
    assert state == "stopped"


def test_a_lost_engine_is_said(visit, server):
    address, script = server
    script.answer = [Delta("Half an ans", (1,)), WorkerError("the engine has stopped; send the request again")]
    page = visit(address)
    ask(page, "One")
    page.wait_for_selector(".note.failed >> text=The engine has stopped; send the request again.")
    assert page.inner_text(".prose").strip() == "Half an ans"


def test_an_answer_that_breaks_off_is_said(visit, server):
    page = visit(server[0])
    chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "Half an ans"}}]})
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=200, body=f"data: {chunk}\n\n"))
    ask(page, "One")
    page.wait_for_selector(".note.failed >> text=The connection was lost in the middle of the answer")
    assert page.inner_text(".prose").strip() == "Half an ans"


def test_the_memory_is_drawn_to_scale(visit, server):
    address, script = server
    plan, accounts = script.engine.plan, script.engine.stats.accounts
    accounts["pages"] = plan.pool_bytes
    page = visit(address)
    page.wait_for_selector("#memory-legend >> text=Keys and values")
    full = plan.pool_bytes / plan.budget_bytes
    assert full > 0.06
    share = """(account) => {
        const bar = document.querySelector("#memory-bar");
        const part = bar.querySelector(`[data-account="${account}"]`);
        return part.getBoundingClientRect().width / bar.getBoundingClientRect().width;
    }"""
    page.wait_for_function(f"() => Math.abs(({share})('pages') - {full}) < 0.02")
    assert page.evaluate(share, "weights") == pytest.approx(accounts["weights"] / plan.budget_bytes, abs=0.02)
    assert page.get_attribute("#memory-legend li >> nth=0", "title") == plan.reasons["weights_bytes"]
    accounts["pages"] //= 2
    page.wait_for_function(f"() => Math.abs(({share})('pages') - {full / 2}) < 0.02")


def test_the_memory_of_several_devices_is_one_bar(visit, server):
    address, script = server
    plan, stats = script.engine.plan, script.engine.stats
    page = visit(address)
    page.wait_for_selector("#memory-legend >> text=Keys and values")
    sizes = "[...document.querySelectorAll('#memory-bar i')].map((part) => Number(part.style.flexGrow))"
    one, total = page.evaluate(sizes), page.text_content("#memory-total")
    script.engine.others = (SimpleNamespace(device="cuda:1", plan=plan, stats=stats, state="ready"),)
    page.wait_for_function(f"() => document.querySelector('#memory-total').textContent !== {json.dumps(total)}")
    assert page.evaluate(sizes) == pytest.approx([2 * size for size in one], rel=1e-4)  # Of six digits in the style.
    assert page.get_attribute("#memory-legend li >> nth=0", "title") == plan.reasons["weights_bytes"]


def test_the_page_by_keyboard_alone(visit, server):
    address, script = server
    page = visit(address)
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    wait_for_answer(page)
    assert script.last.messages[0].content == ("One\nTwo",)
    page.locator("#settings-open").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#settings[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#settings", state="hidden")
    assert page.evaluate("document.activeElement.id") == "settings-open"
    page.locator("[aria-label='Answer again']").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    wait_for_answer(page)
    assert len(script.engine.requests) == 2


def test_every_control_has_a_name_and_is_reached_by_tab(visit, server):
    page = visit(server[0])
    ask(page, "One", "red-circle.png")
    wait_for_answer(page)
    attach(page, "words.wav")
    page.evaluate("() => { document.body.tabIndex = -1; document.body.focus(); }")
    focused = """() => {
        const at = document.activeElement;
        return [at.id, at.getAttribute("aria-label") ?? at.labels?.[0]?.innerText ?? at.innerText];
    }"""
    reached = {}
    for _ in range(25):
        page.keyboard.press("Tab")
        name, label = page.evaluate(focused)
        reached[name or label] = label
    assert reached.keys() >= {"new", "title", "export", "delete", "settings-open", "text", "attach", "record", "send"}
    assert reached.keys() >= {
        "Show red-circle.png",
        "Copy answer",
        "Answer again",
        "Play words.wav",
        "Remove words.wav",
    }
    assert all(label for name, label in reached.items() if name), reached


def test_the_page_on_a_phone(visit, server):
    address, script = server
    script.answer = said("| a | b |\n|---|---|\n| 1 | 2 |\n\n```\n" + "long " * 60 + "\n```\n\n" + "w" * 300)
    page = visit(address, **NARROW)
    ask(page, "One " * 40, "wide.png", "words.wav", "shapes.png")
    wait_for_answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('#scroller').scrollWidth") <= 390
    composer = page.locator("#composer").bounding_box()
    assert composer["y"] + composer["height"] <= 780
    assert page.locator("#sidebar").is_hidden()
    page.tap("#menu")
    page.wait_for_selector("#memory-legend >> text=Weights")
    page.tap("#conversations button")
    page.wait_for_selector("#sidebar", state="hidden")
    page.tap("#new-narrow")
    page.wait_for_selector("body.empty")


@pytest.mark.parametrize("system", ["light", "dark"])
def test_colours_follow_the_system_until_they_are_chosen(visit, server, system):
    page = visit(server[0], color_scheme=system)
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    colours = {"light": "rgb(253, 253, 252)", "dark": "rgb(21, 24, 23)"}
    assert page.evaluate(paper) == colours[system]
    other = "dark" if system == "light" else "light"
    page.click("#settings-open")
    page.click(f".choice >> text={other.title()}")
    assert page.evaluate(paper) == colours[other]
    page.reload()
    assert page.evaluate(paper) == colours[other]
