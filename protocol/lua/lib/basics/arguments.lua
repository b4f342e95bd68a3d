-- The next argument. KEYS[1] is not read, it only routes the call: with RQ_KEY_PREFIX='{rq}' all keys lie in one slot.
-- A claim cannot know which ids it will find, so scripts make the names of keys themselves, from the table KEY.
local cursor = 0
local function arg()
  cursor = cursor + 1
  return ARGV[cursor]
end
