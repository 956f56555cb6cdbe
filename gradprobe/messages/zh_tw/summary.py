"""一次執行的內容，臺灣正體中文。"""

MESSAGES: dict[str, str] = {
    "summary.what": "{file}：{rows}，{tasks}，{where}；{state}。",
    "summary.rows": "{n} 列",
    "summary.rows_steps": "{n} 列（第 {first} 至 {last} 步）",
    "summary.tasks": "任務 {tasks:and}",
    "summary.many_tasks": "{n} 個任務（{tasks}、……）",
    "summary.layers": "{n} 個共享層，共 {parameters:,} 個參數",
    "summary.features": "{n} 個特徵",
    "summary.trained": "{where}，訓練器 {trainer}",
    "summary.unfinished": "未結束（仍在寫入，或行程已被中止）",
    "summary.audit": "這是稽核，不是紀錄：{sentence}",
    "summary.door": "{door}：{evidence}。關閉方式：{how}。",
    "summary.no_row": "沒有記錄任何一列，因此對梯度無從說起。",
    "summary.at_features_only": "未量測參數上的梯度（level='features'）。",
    "summary.not_shared": "各任務沒有共享層，因此梯度之間的餘弦無定義：干擾不適用，這不等於 0。",
    "summary.caution": "這些是單一小批次的讀數，大多是雜訊。它們不能顯示是否存在干擾，也不能顯示干擾是否降低：那需要"
    "對照組。",
    # ---- 列與層
    "summary.not_measured": "{rows} 列中有 {n} 列未完整量測：{why:semicolons}。",
    "summary.why": "{reason}（{n}）",
    "summary.dropped": "有 {n} 列遺失；`gradprobe check` 會說明可能的原因。",
    "summary.graph_only": "{n} 個層不納入任何總和：計算圖將兩個任務引到該處，但梯度曾不為 0 的任務少於兩個"
    "（{names}）。",
    "summary.joined": "有 {n} 個層在開始之後才成為共享層（{names}）。",
    "summary.from_step": "{layer} 自第 {step} 步起",
    "summary.lacking": "{rows} 列中有 {n} 列缺少部分層，僅以現有的層量測；最常缺少：{names}。",
    "summary.lacks": "{layer} 缺 {n} 列",
    "summary.absent": "有 {n} 列缺少任務，這些任務在該列不納入中位數與總和。",
    "summary.long": "紀錄很長：以下關於梯度的內容取自每 {every} 列中的一列（共 {rows:,} 列）；損失、權重與計數取自全"
    "部。",
    # ---- 損失、權重、長度
    "summary.losses": "訓練損失（前後各 {n} 列的中位數）：{changes:semicolons}。",
    "summary.loss_moved": "{task} 的損失由 {first:.4g} 變為 {last:.4g}",
    "summary.loss_stayed": "{task} 的損失維持 {first:.4g}",
    "summary.weights": "權重：{changes:semicolons}。兩個任務梯度之間的餘弦與權重無關；主導程度則與權重有關。",
    "summary.weight_moved": "{task} 的權重由 {first:.4g} 變為 {last:.4g}",
    "summary.weight_stayed": "{task} 的權重維持 {first:.4g}",
    "summary.norms": "各任務在其共享層上的梯度長度（中位數，單位為損失除以參數）：{values}。",
    "summary.value": "{name} {value:.3g}",
    "summary.share": "{name} {value:.0%}",
    "summary.unknown": "{name} 未知",
    # ---- 梯度
    "summary.no_cosine": "{tasks:and}：未量測餘弦。",
    "summary.lowest": "{of} 個任務對中，餘弦中位數最低的 {n} 個（全部：`summary --json`）：",
    "summary.cosine": "{tasks:and}：所有共享層的餘弦中位數為 {median:+.2f}（中間半數為 {low:+.2f} 至 {high:+.2f}）；"
    "{rows} 個量測步中有 {rate:.0%} 低於零（隨機衝突率）。",
    "summary.cosine_of": "{tasks:and} {value:+.2f}",
    "summary.exact": "自第 {step:.0f} 步起，每個任務都有自己的反向傳播，各列皆為精確值：由聯合梯度推得的梯度曾因層內"
    "捨入而相差長度的 {value:.1e}。",
    "summary.sketched": "每個任務的梯度在每一層壓縮為 {kept:,} 個數：在較大的層上，接近 0 的餘弦每列約準確到 "
    "{error:.1g}（標準差），沒有偏差；長度則準確到 {norm:.1%}。",
    "summary.features_all": "在各任務分開之處，其梯度在特徵上的餘弦中位數：{values:semicolons}。這些值界定參數梯度可"
    "能的範圍，但不是對它的量測。",
    "summary.features_lowest": "在各任務分開之處，其梯度在特徵上的餘弦中位數，{of} 個中最低的 {n} 個："
    "{values:semicolons}。這些值界定參數梯度可能的範圍，但不是對它的量測。",
    "summary.at_feature": "{feature} 處 {tasks:and} 為 {median:+.2f}（{rows} 步）",
    "summary.dominance": "主導程度（加權梯度平方的份額，中位數）：{values}。",
    "summary.effects": "一個任務在該步中的份額對另一個任務自身進展的影響（正為助益，負為抵銷；一階近似，同一小批次，"
    "中位數）：{values:semicolons}。",
    "summary.effect": "{by} 對 {task} {value:+.2f}",
    # ---- 更新
    "summary.update_unknown": "{rows} 次更新中有 {n} 次未依任務拆開：{why:semicolons}。",
    "summary.update_shares": "更新中的份額（經動量與預條件，中位數）：{update}；梯度中的份額：{gradient}。",
    "summary.update_cosines": "各任務在更新中的份額之間的餘弦（中位數）：{values:semicolons}。",
    "summary.update_effects": "一個任務在更新中的份額對另一個任務自身進展的影響（一階近似，中位數）："
    "{values:semicolons}。",
    "summary.clipped": "{rows} 次更新中有 {n} 次先縮小了梯度，最小縮為 {least:.2g} 倍；在其長度平方中的份額（中位數）："
    "{parts}。",
    "summary.skipped": "有 {n} 步沒有造成任何改變。",
    "summary.batchnorm": "BatchNorm 每步平均了 {batches:.3g} 個批次：每步不只一次前向傳播，因此其統計值混合了各批次"
    "的資料。",
    # ---- 損失帳
    "summary.ledger": "損失帳：{rows} 列中有 {n} 列可計入。",
    "summary.cancelled": "{by} 在更新中的份額抵銷了 {task} 自身進展的 {part:.0%}（C = {c:+.2f}），僅就這次執行而言。",
    "summary.added": "{by} 在更新中的份額增加了 {task} 自身進展的 {part:.0%}（C = {c:+.2f}），僅就這次執行而言。",
    "summary.alone": "在相同狀態下，{task} 的梯度若沒有其他任務的梯度，原本可有的進展中，因步伐縮短而失去 "
    "{shrunk:.0%}，因其他任務在更新中的份額而失去 {cancelled:.0%}。",
    "summary.dominated": "{task} 的損失主要來自主導而非抵銷：{task} 的步伐所除以的二階動量，大多是其他任務的梯度。C 不"
    "含這一項。",
    "summary.ledger_shut": "無從得知其他任務對 {task} 做了什麼：{gates:semicolons}。",
    # ---- 探測資料
    "summary.probe": "在獨立樣本上（探測資料 {rows} 列），扣除雜訊，以所有訓練步計算：餘弦 {cosines:semicolons}。雜"
    "訊與梯度等長時的批次大小（樣本數）：{scales}。",
    "summary.probe_split": "在獨立樣本上（{split}，探測資料 {rows} 列），扣除雜訊，以所有訓練步計算：餘弦 "
    "{cosines:semicolons}。雜訊與梯度等長時的批次大小（樣本數）：{scales}。",
    "summary.probe_cosine": "{tasks:and} {cosine:+.2f}（這次執行的 95 % 信賴區間 {low:+.2f} 至 {high:+.2f}）",
    "summary.probe_hidden": "{tasks:and} 無法與雜訊區分",
    "summary.probe_missing": "其中 {n} 列未完整量測：{why:semicolons}。",
    # ---- 指標與成本
    "summary.metrics": "指標，由第一個至最後一個訓練週期（自 0 起算）：{values:semicolons}。",
    "summary.metric_highest": "{name} {first:.3g} 至 {last:.3g}（最高 {best:.3g}，第 {epoch} 個訓練週期）",
    "summary.metric_lowest": "{name} {first:.3g} 至 {last:.3g}（最低 {best:.3g}，第 {epoch} 個訓練週期）",
    "summary.more": "另外 {n} 項（全部：`summary --json`）",
    "summary.overhead": "量測用了 {seconds:.3g} 秒，占紀錄時間的 {share:.0%}。",
    # ---- 任務很多時
    "crowd.spread": "中位數 {median:.3g}，由 {low:.3g}（{lowest}）至 {high:.3g}（{highest}）",
    "crowd.spread_share": "中位數 {median:.0%}，由 {low:.0%}（{lowest}）至 {high:.0%}（{highest}）",
    "crowd.moved": "{parts}",
    "crowd.stayed": "全部 {n} 個任務都維持不變",
    "crowd.fell": "{of} 個任務中有 {n} 個下降",
    "crowd.rose": "{n} 個上升（{names}）",
    "crowd.same": "{n} 個不變",
}
