--- @include lib/numbers

-- Whether the caller's protocol is the newest that has written here; from now on it is, if it is newer. So the
-- first worker or producer of a newer protocol stops all that speak an older one.
local function speaks(schema)
  local newest = number_of(redis.call('GET', KEY.schema), -1)
  if newest > tonumber(schema) then return false end
  if newest < tonumber(schema) then redis.call('SET', KEY.schema, schema) end
  return true
end
