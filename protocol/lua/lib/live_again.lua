--- @include lib/time

-- An ended request that is to run again loses the TTL of its end. Its outputs, history and results live for a day
-- after each write, as for any living request. So if RQ's tools delete its job, nothing stays for ever.
local function live_again(id)
  redis.call('PERSIST', KEY.job .. id)
  for _, name in ipairs({ KEY.output, KEY.history, KEY.results }) do redis.call('EXPIRE', name .. id, DAY) end
end
