-- How an execution ended last: what follows the colon in `last`. nil if none has.
local function verdict_of(last)
  return string.match(last or '', ':(%a+)$')
end
