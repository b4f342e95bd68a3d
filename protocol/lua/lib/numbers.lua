-- A number as text: '%d' and tostring() turn large numbers into floats or exponents.
local function int(number)
  return string.format('%.0f', number)
end

-- A number that stands in Redis; `other` (or 0) for what is none: somebody else may have written it, and a script
-- that stops halfway leaves halfway.
local function number_of(text, other)
  local number = tonumber(text or '')
  if number and number >= -9007199254740992 and number <= 9007199254740992 then return math.floor(number) end
  return other or 0
end
