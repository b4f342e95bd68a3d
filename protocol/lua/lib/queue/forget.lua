--- @include lib/checkpoint/chunks

-- Delete what belongs to a request whose job hash is gone (Job.delete, Queue.empty, expiry). Does nothing if there is a
-- hash: the id may have been used again.
local function forget(id)
  if redis.call('HEXISTS', KEY.job .. id, 'created_at') == 1 then return end
  drop_all_chunks(id)
  redis.call('DEL', KEY.output .. id, KEY.checkpoint .. id, KEY.history .. id)
  redis.call('ZREM', KEY.checkpoints, id)
end

local function drop_checkpoint(id)
  drop_all_chunks(id)
  redis.call('DEL', KEY.checkpoint .. id)
  redis.call('ZREM', KEY.checkpoints, id)
end
