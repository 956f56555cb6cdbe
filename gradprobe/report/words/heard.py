"""What a comparison says in English, in the report's language: sentence by sentence, each known by its form.

A comparison speaks English, to the command line and to programs. A report in another language says the same from here;
a sentence that is not known here stays as it is, and is marked as English.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

TERMS: dict[str, dict[str, str]] = {
    "zh-TW": {
        "initial weights": "初始權重",
        "batches": "批次",
        "budget": "訓練預算",
        "data": "資料",
        "lower": "低",
        "higher": "高",
        "baseline": "基準組",
        "more than the rows' noise": "超過各列的雜訊",
        "no more than the rows' noise": "未超過各列的雜訊",
        "the number of training samples": "訓練樣本數",
        "the noise scale of": "雜訊尺度：",
        "one of them did not come to its end": "其中之一未執行到結束",
        " and ": " 與 ",
    }
}
"""Words in places whose names begin with "term"."""

FORMS: dict[str, dict[str, str]] = {
    "zh-TW": {
        # ---- may they be compared
        "{arm} and {baseline} have no seed in common; --unpaired compares them as independent runs.": "{arm} 與 "
        "{baseline} 沒有共同的種子；`--unpaired` 可將它們當作獨立的執行來比較。",
        "{other} and {one} (seed {seed}) differ in {terms}. A difference between them could come from that. Record "
        "them alike (gradprobe study does), or take them as independent: --unpaired.": "{other} 與 {one}（種子 {seed}"
        "）在{terms}上不同，兩者的差異可能由此而來。請以相同條件記錄（`gradprobe study` 會這麼做），或視為獨立："
        "`--unpaired`。",
        "{other} and {one} do not show that they had the same {terms}. If runs of one seed did, say so: --paired; "
        "else --unpaired compares them as independent runs.": "{other} 與 {one} 未能顯示兩者的{terms}相同。若同一種子"
        "的執行確實相同，請指定 `--paired`；否則 `--unpaired` 可將它們當作獨立的執行來比較。",
        "the files of {arm} do not name their seeds. If the files of both arms belong together in their order, say "
        "so: --paired; else: --unpaired.": "{arm} 的檔案沒有註明種子。若兩組的檔案依序成對，請指定 `--paired`；否則用 "
        "`--unpaired`。",
        # ---- may they be compared
        "{arm} and {baseline} differ in {terms}, and are compared all the same.": "{arm} 與 {baseline} 在{terms}上不同"
        "，但仍予以比較。",
        # ---- may they be compared
        "{arm} and {baseline}: seeds {seeds} are in one of them only, and left out.": "{arm} 與 {baseline}：種子 "
        "{seeds} 只出現在其中一組，不納入。",
        "{arm} differs from {baseline} also in {what}: a difference may come from that.": "{arm} 與 {baseline} 還有以"
        "下不同：{what}；差異可能由此而來。",
        "there is no control run: no arm {arm} (arms: {there}); name one with --baseline.": "沒有對照：沒有名為 {arm} "
        "的組別（現有：{there}）；請用 `--baseline` 指定。",
        "there is nothing to compare {arm} with.": "沒有可與 {arm} 比較的組別。",
        "There is no run of one task alone (--trainer single): no conclusion about what sharing costs the tasks.": "沒"
        "有單任務訓練（`--trainer single`）：無法對「共享使各任務付出多少代價」下結論。",
        # ---- the plan
        "{name} was planned as {planned}, and this comparison goes by {now}.": "{name} 的計畫值為 {planned}，這次比較"
        "採用 {now}。",
        "{arm}: seeds {seeds} were planned and are not there.": "{arm}：計畫中的種子 {seeds} 不在檔案中。",
        "{arm}: seeds {seeds} were not planned.": "{arm}：種子 {seeds} 不在計畫中。",
        "arm {arm} was planned and is not there.": "計畫中的組別 {arm} 不在檔案中。",
        "arm {arm} was not planned.": "組別 {arm} 不在計畫中。",
        "{file} holds no plan, and others do.": "{file} 沒有計畫，其他檔案有。",
        "{file} was recorded under another plan: {name} is not the same.": "{file} 依另一份計畫記錄：{name} 不同。",
        "{file}: {name} was planned as {planned}, and was {now}.": "{file}：{name} 的計畫值為 {planned}，實際為 {now}"
        "。",
        "{file} did not come to its end.": "{file} 未執行到結束。",
        "{arm} mixes settings: {name} is {one} in {file} and {other} in {another}.": "{arm} 混用設定：{name} 在 {file}"
        " 為 {one}，在 {another} 為 {other}。",
        # ---- what misleads
        "{file}: {n} recorded steps are partial batches ({size} of {full} samples): their losses are not comparable "
        "with the others.": "{file}：有 {n} 個記錄的訓練步是不完整的批次（{full} 個樣本中只有 {size} 個），其損失不能"
        "與其他步相比。",
        "{file}: the loss of {task} is scaled by batch size: at partial batches it is low for that alone.": "{file}："
        "{task} 的損失會隨批次大小縮放：在不完整的批次上，僅因此就會偏低。",
        "{arm}: the training loss of {task} ends {n} % {term} than in {baseline}. Training loss is no evidence of "
        "interference, and is no part of any verdict.": "{arm}：{task} 的最終訓練損失比 {baseline} {term} {n} %。訓練"
        "損失不是干擾的證據，也不納入任何判定。",
        "from {n} {seeds} there is a description and no verdict; at least {least} are needed, and 5 to 8 give an "
        "answer.": "{n} 個種子僅為描述，不作判定；至少需要 {least} 個，5 至 8 個才能得到答案。",
        "a number of it is not known, so there is no interval.": "其中有數值未知，因此沒有信賴區間。",
        "The differences lean to one side: a t interval then errs up to 13 % of the time instead of 5.": "差異偏向一側"
        "：此時 t 區間的錯誤率可達 13 %，而非 5 %。",
        "No gradient can interfere: {sentence}": "不可能有梯度干擾：{sentence}",
        "{arm} trains {task} alone: no other task can interfere.": "{arm} 只訓練 {task}：沒有其他任務可以干擾。",
        "in {arm} {terms} share no layer that they share in the baseline: what is not shared has no angle.": "在 {arm}"
        " 中，{terms} 沒有與基準組相同的共享層：未共享者無角度可言。",
        "Over the {n} layers that both arms share; {m} of the baseline's are left out.": "以兩組共有的 {n} 層計算；基"
        "準組另有 {m} 層不納入。",
        "{file} was not measured in micro-batches, and single minibatches show mostly noise; record with {how}.": ""
        "{file} 未以微批次量測，而單一小批次大多是雜訊；請以 `{how}` 記錄。",
        "From the training stream: a claim rests better on a probe loader (--probe-loader val).": "取自訓練資料流：以"
        "探測資料為據較為可靠（`--probe-loader val`）。",
        "Shares: {what}.": "份額：{what}。",
        "{file} holds no ledger; record with --ledger ({why}).": "{file} 沒有損失帳；請以 `--ledger` 記錄（需在每個連"
        "續區段的每一步取得所有任務的梯度）。",
        "Of {task}'s terms the ledger leaves at most {part} unexplained.": "{task} 的各項中，損失帳至多有 {part} 未能"
        "解釋。",
        "Both arms have the same weights: no difference can come from weights.": "兩組的權重相同：差異不可能來自權重。",
        "there is no run of {terms} alone, so what sharing costs is not known; record with --trainer single --task "
        "{task}.": "沒有 {terms} 的單任務訓練，因此不知道共享的代價；請以 `--trainer single --task {task}` 記錄。",
        "The interval is over seeds alone: which images of one clip or patient belong together is not in the files, "
        "so that it says nothing of other images.": "此區間只涵蓋種子：檔案未註明哪些影像屬於同一片段或病人，因此不能"
        "推論到其他影像。",
        "The interval is over seeds and over the {n} independent clusters of the test split.": "此區間涵蓋種子與測試集"
        "的 {n} 個獨立群集。",
        "no file holds metrics of a test split, so nothing is said of the outcome.": "沒有檔案含有測試集的指標，因此對"
        "成效無從說起。",
        "{file} holds no {metric} of the test split": "{file} 沒有測試集的 {metric}",
        "Weights cannot change a cosine at given parameters; what changed came through the trajectory.": "在給定參數下"
        "，權重不能改變餘弦相似度；若有改變，是經由訓練軌跡而來。",
        "Who decides the update says nothing of whether tasks cancel each other.": "由誰主導更新，並不說明任務之間是否"
        "互相抵銷。",
        "Of this test split; training loss is no part of it.": "僅就這個測試集而言；不含訓練損失。",
        "At the baseline's checkpoints the weights of {arm} change what {by} cancels of {task}'s first-order "
        "progress by {n}; the effect above is along each arm's own training.": "在基準組的檢查點上，{arm} 的權重使 "
        "{by} 對 {task} 一階進展的抵銷改變 {n}；上面的效應則沿各組自己的訓練。",
        "At the baseline's checkpoints {task}'s gradient cannot be told from noise: there is no direct effect.": "在基"
        "準組的檢查點上，{task} 的梯度無法與雜訊區分：沒有直接效應。",
        # ---- gates
        "no self-check is in the file; {how}": "檔案中沒有自我檢查；請以這個版本重新記錄",
        "a task has cosine {one} with its own copy and {other} with its negative": "一個任務與自身副本的餘弦為 {one}，"
        "與其負值的餘弦為 {other}",
        "no run was made twice, so that it is not known how far the same training differs from itself; record the "
        "baseline's first seed a second time, into a file such as {file} (gradprobe study does)": "沒有任何執行做過兩遍"
        "，因此不知道同一次訓練重做時會相差多少；請將基準組的第一個種子再記錄一次，存成如 {file} 的檔案（`gradprobe "
        "study` 會這麼做）",
        "{terms} are the same run made twice, and equal to the bit": "{terms} 是同一次執行做了兩遍，逐位元相同",
        "{terms} are the same run made twice, and not all of them give a number of what is judged here": "{terms} 是同"
        "一次執行做了兩遍，但對此處判定的量，並非都有數值",
        "{terms} are the same run made twice, and differ by {n} in what is judged here; {limit} is allowed, half the "
        "margin: where it is more, train deterministically": "{terms} 是同一次執行做了兩遍，在此處判定的量上相差 {n}；"
        "容許 {limit}，即容許差的一半；超過時，請以確定性方式訓練",
        "no run was made twice; the losses of the first step are equal to the bit": "沒有任何執行做過兩遍；第一步的損"
        "失逐位元相同",
        "{terms}: no run was made twice, and step 0 was not recorded in both": "{terms}：沒有任何執行做過兩遍，且並非"
        "兩者都記錄了第 0 步",
        "{terms} differ in the losses of their first step, before any update: {one} and {other}": "{terms} 在任何更新"
        "之前，第一步的損失就不同：{one} 與 {other}",
        "not measured in micro-batches; record with {how}": "未以微批次量測；請以 `{how}` 記錄",
        "of {task}'s squared gradient {one} the lower bound is {other}; where that is not above 0, take more or "
        "larger probe batches": "{task} 的梯度平方為 {one}，下界為 {other}；若不大於零，請用更多或更大的探測批次",
        "valued on a fixed probe batch": "以固定的探測批次估值",
        "measured on a probe loader, drawn with replacement": "以可重複抽樣的探測資料量測",
        "{term} is not known; record with {how}": "{term}未知；請以 `{how}` 記錄",
        "{n} training samples are {ratio} times {task}'s noise scale of {scale}; {limit} times are asked for, or its "
        "estimates are biased by shuffling": "{n} 個訓練樣本是 {task} 雜訊尺度 {scale} 的 {ratio} 倍；至少需要 {limit}"
        " 倍，否則洗牌會使估計有偏差",
        "no ledger; record with --ledger": "沒有損失帳；請以 `--ledger` 記錄",
        "{run}: {sentence}": "{run}：{sentence}",
        "{n} rows of the ledger count": "損失帳有 {n} 列可計入",
        "of {task}'s loss the terms leave {part} of their size unexplained, which is {term}": "{task} 的損失中，各項有"
        " {part} 未能解釋，{term}",
        "momentum from before the burst is {part} of {task}'s terms": "連續區段之前的動量占 {task} 各項的 {part}",
        "{task}'s own progress is {n} of its standard errors above 0": "{task} 自身的進展高於零 {n} 個標準誤",
    }
}
"""English sentence -> the same; what stands in braces is whatever the sentence names."""


def heard(lang: str, sentence: str) -> tuple[str, bool]:
    """A sentence of a comparison in a language.

    Returns:
        The sentence, and whether it is in English for want of a form.

    >>> heard("zh-TW", "arm dual was not planned.")
    ('組別 dual 不在計畫中。', False)
    >>> heard("zh-TW", "Never said.")
    ('Never said.', True)
    """
    if lang not in FORMS:
        return sentence, False
    found: str | None = _whole(lang, sentence) or _in_parts(lang, sentence)
    return (sentence, True) if found is None else (found, False)


def _whole(lang: str, sentence: str) -> str | None:
    for pattern, form in _patterns(lang):
        match = pattern.fullmatch(sentence)
        if match is None:
            continue
        values = {name: _value(lang, name, value) for name, value in match.groupdict().items()}
        if None not in values.values():
            return form.format(**values)
    return None


def _value(lang: str, name: str, value: str) -> str | None:
    """A name as it is, a term translated, a sentence heard; None: that cannot be."""
    if name.startswith("term"):
        for term, other in TERMS[lang].items():
            value = value.replace(term, other)
    if name == "sentence":
        said, english = heard(lang, value)
        return None if english else said
    return value


def _in_parts(lang: str, sentence: str) -> str | None:
    """Several that are joined by semicolons, as gates are, with or without an end of their own."""
    bare = sentence.removesuffix(".")
    if bare != sentence and (found := _whole(lang, bare)):
        return f"{found}。"
    for place in re.finditer("; ", bare):
        first = _whole(lang, bare[: place.start()])
        if first:
            rest, english = heard(lang, bare[place.end() :])
            if not english:
                return f"{first}；{rest}" + "。" * (bare != sentence)
    return None


@lru_cache(maxsize=4)
def _patterns(lang: str) -> list[tuple[re.Pattern[str], str]]:
    return [(_pattern(english), form) for english, form in FORMS[lang].items()]


def _pattern(form: str) -> re.Pattern[str]:
    """The form as an expression; a run is told by its seed, so that not every colon makes one."""
    parts: Mapping[str, str] = {"run": r"[^;]+?, seed [^\s:;]+"}
    pieces = re.split(r"\{(\w+)\}", form)
    text = "".join(
        re.escape(piece) if i % 2 == 0 else f"(?P<{piece}>{parts.get(piece, '.+?')})" for i, piece in enumerate(pieces)
    )
    return re.compile(text, re.DOTALL)
