-- A number as text: '%d' and tostring() turn large numbers into floats or exponents.
local function int(number)
  return string.format('%.0f', number)
end

-- A number that was read from Redis; `other` (or 0) if it is none. Somebody else may have written it, and a script that
-- stops with an error leaves half of its writes.
local function number_of(text, other)
  local number = tonumber(text or '')
  if number and number >= -9007199254740992 and number <= 9007199254740992 then return math.floor(number) end
  return other or 0
end
