-- How a request ended: what stands behind the colon in `last`. nil if it has not, or nobody has said so.
local function verdict_of(last)
  return string.match(last or '', ':(%a+)$')
end
