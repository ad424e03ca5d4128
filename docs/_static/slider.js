// The fit to noisy points of sin(5x) and its slope, at the strength that the slider shows.
(() => {
  const figure = document.getElementById('sin-slider'), part = name => figure.querySelector(name)
  const {points, batch, fits} = JSON.parse(part('[type="application/json"]').textContent)
  const [top, below] = figure.querySelectorAll('svg')
  const input = part('input'), output = part('output'), said = part('figcaption')
  const flat = key => fits.flatMap(o => o[key]).sort((a, b) => a - b)
  const width = Math.round(Math.min(720, Math.max(300, figure.clientWidth)))  // letters keep their size on a phone
  const left = 34, right = width - 8
  const span = values => {
    const cut = Math.floor(values.length/200)  // a few spikes may leave the frame
    return [values[cut], values[values.length - 1 - cut]]
  }
  const px = x => left + (x + 1)/2*(right - left)

  function panel(svg, [low, high], name) {
    const h = svg.viewBox.baseVal.height, foot = h - 36, pad = (high - low)*.04, frame = `frame-${h}`
    const py = y => foot - (y - low + pad)/(high - low + 2*pad)*(foot - 20)
    const step = [.5, 1, 2, 5, 10, 20, 50].find(o => (high - low)/o < 7) || 100
    const ticks = [`<clipPath id="${frame}"><path d="M${left} 20H${right}V${foot}H${left}Z"/></clipPath>`]
    svg.setAttribute('viewBox', `0 0 ${width} ${h}`)
    const text = (x, y, anchor, said) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${said}</text>`
    for (let y = Math.ceil((low - pad)/step)*step; y <= high + pad; y += step)
      ticks.push(`<path class="grid" d="M${left} ${py(y)}H${right}"/>`, text(left - 6, py(y) + 4, 'end', y))
    for (let x = -1; x <= 1; x += .5) ticks.push(text(px(x), h - 21, 'middle', x))
    ticks.push(`<text class="name" x="${left}" y="12">${name}</text>`, text(px(0), h - 4, 'middle', 'input x'))
    svg.firstElementChild.innerHTML = ticks.join('')
    const line = (xs, ys, cls) => {
      const path = document.createElementNS('http://www.w3.org/2000/svg', 'path')
      path.setAttribute('class', cls)
      path.setAttribute('clip-path', `url(#${frame})`)
      path.setAttribute('d', 'M' + xs.map((x, i) => `${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`).join('L'))
      svg.firstElementChild.append(path)
      return path
    }
    return {line, py, g: svg.firstElementChild}
  }
  const outputs = [...flat('fit'), ...points.y].sort((a, b) => a - b)
  const fitPanel = panel(top, span(outputs), 'output of the network (dotted: sin 5x)')
  const slopePanel = panel(below, span(flat('slope')), 'slope of the output (dotted: 5 cos 5x)')
  const first = fits[0], truth = first.x.map(x => Math.sin(5*x)), truthSlope = first.x.map(x => 5*Math.cos(5*x))
  fitPanel.line(first.x, truth, 'truth'); slopePanel.line(first.x, truthSlope, 'truth')
  const dot = (x, i) => `<circle cx="${px(x).toFixed(1)}" cy="${fitPanel.py(points.y[i]).toFixed(1)}" r="2"/>`
  fitPanel.g.insertAdjacentHTML('beforeend', points.x.map(dot).join(''))
  const drawn = [[fitPanel, 'fit', truth], [slopePanel, 'slope', truthSlope]].map(
    ([p, key, wanted]) => ({p, key, wanted, path: p.line(first.x, first[key], 'fit')}))
  const rms = (a, b) => Math.sqrt(a.reduce((sum, o, i) => sum + (o - b[i])**2, 0)/a.length)

  function show() {
    const o = fits[input.value], [off, offSlope] = drawn.map(({key, wanted}) => rms(o[key], wanted))
    for (const d of drawn) { d.path.remove(); d.path = d.p.line(o.x, o[d.key], 'fit') }
    output.textContent = o.lam
    input.setAttribute('aria-valuetext', `strength ${o.lam}`)
    const ofMean = +(2*o.lam/batch).toPrecision(2)
    said.textContent = `At strength ${o.lam} (${ofMean} where the loss is a mean) the output is `
      + `${off.toFixed(3)} away from sin(5x), its slope ${offSlope.toFixed(2)} from 5 cos(5x) `
      + `(root mean squares over ${o.x.length} points).`
  }
  input.max = fits.length - 1
  input.addEventListener('input', show)
  show()
})()
