"""由一次執行所得的建議，臺灣正體中文。"""

MESSAGES: dict[str, str] = {
    "advice.title": "餘弦，衝突最大的層在前（區間僅就這次執行而言）",
    "advice.title_of": "{pair} 的餘弦，衝突最大的層在前（區間僅就這次執行而言）",
    "column.parameters": "參數數",
    "column.cosine": "餘弦",
    "column.score": "分數",
    "column.conflict": "衝突",
    "advice.nothing": "無須處理：沒有任務對或層的衝突超出雜訊與偶然，也沒有任務獨大。",
    "advice.direction": "方向：{tasks:and} 的梯度互相衝突（餘弦 {cosine:+.2f}，{low:+.2f} 至 {high:+.2f}）。任何權重"
    "都不能改變這點；梯度手術或加倍的層或許可以。",
    "advice.dominance": "主導：{task} 占加權梯度平方的 {share:.0%}。權重（`--task-weights`、`gradnorm`）可以改變這點。",
    "advice.layers": "{of} 個層中有 {n} 個互相衝突（錯誤發現率 10 %，探索性）。將其加倍：`gradprobe record --trainer "
    "split --from {file} --top-k {n}`",
    "advice.layers_doubled": "{of} 個層中有 {n} 個互相衝突（錯誤發現率 10 %，探索性）。另有 {doubled} 個層已加倍；"
    "`split` 需要未分割模型的執行。",
    "advice.no_weights": "在多數列中，沒有正的權重能使所有任務有相同的相對進展。",
    "advice.weights": "使所有任務有相同相對進展的權重（一階近似）：`--task-weights {given}`（中間半數："
    "{spread:semicolons}）。",
    "advice.spread": "{task} {low:.3g} 至 {high:.3g}",
    "advice.dual": "雙骨幹需要再增加 {n:,} 個參數{share}。",
    "advice.rest": "將仍共享的層加倍，需要再增加 {n:,} 個參數{share}。",
    "advice.share": "，為模型 {whole:,} 個參數的 {part:.0%}",
    "advice.caution": "僅就一次執行的單一小批次而言：任務共用的樣本會使餘弦有偏差。補救是否有效，需以相同的種子比較有無"
    "補救的執行。",
    # ---- 其他方法會如何
    "replay.title": "重演（各列的中位數）",
    "replay.method": "方法",
    "replay.weight": "權重",
    "replay.progress": "進展",
    "replay.change": "相對於 joint 的變化",
    "replay.harmed": "受損",
    "replay.length": "步長",
    "replay.reading": "在記錄的參數上，一階近似，同一小批次。進展為 1：如同沒有其他任務。以這些權重訓練會如何，需要"
    "實際執行。",
    "replay.gradnorm": "gradnorm 只看到 {steps} 步中量測的 {n} 列：實際訓練時它每一步都會變動。請以 `--every 1` 記錄，"
    "以取得它自己的權重。",
}
